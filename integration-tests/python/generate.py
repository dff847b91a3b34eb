"""A client that knows only the .proto files: streams one greedy generation and prints it as JSON.

usage: generate.py STUBS_FOLDER ADDRESS PROMPT
"""

import json
import sys

stubs, address, prompt = sys.argv[1:4]
sys.path.insert(0, stubs)

import grpc  # noqa: E402
from kivimesh.v1 import inference_pb2, inference_pb2_grpc  # noqa: E402

with grpc.insecure_channel(address) as channel:
    client = inference_pb2_grpc.InferenceStub(channel)
    request = inference_pb2.GenerateRequest(
        prompt=prompt, max_tokens=8, sampling=inference_pb2.Sampling(temperature=0)
    )
    text, usage = "", None
    for message in client.Generate(request, timeout=120):
        if message.HasField("delta"):
            text += message.delta.text
        else:
            usage = message.finish.usage
print(json.dumps({"text": text, "promptTokens": usage.prompt_tokens, "worker": usage.kivimesh.worker}))
