import {
  type Chat,
  ClusterError,
  FinishReason,
  type GenerateRequest,
  Inference,
  implementService,
  type ServiceBinding,
} from "@kivimesh/proto";
import { z } from "zod";
import { type GenerationInput, type GenerationRequest, parseRequest, requestFields } from "./generation-request.ts";
import type { RequestOutcome } from "./running-request.ts";
import type { ServedModel } from "./served-model.ts";
import type { GenerationEvent, TextGenerator } from "./text-generation.ts";

const samplingSchema = z.object({
  temperature: requestFields.temperature.default(1),
  top_p: requestFields.top_p.default(1),
  top_k: requestFields.top_k.default(0),
  max_tokens: requestFields.max_tokens.optional(),
  stop: requestFields.stop,
  cache_salt: requestFields.cache_salt,
});

const reasons: Record<RequestOutcome, FinishReason> = {
  stop: FinishReason.STOP,
  length: FinishReason.LENGTH,
  cancelled: FinishReason.CANCELLED,
};

/** The public gRPC API. */
export function inferenceService(
  generator: TextGenerator,
  models: () => readonly ServedModel[],
  cancel: (requestId: string) => boolean,
): ServiceBinding {
  return implementService(Inference, {
    async *generate(request, context) {
      const generation = await generator.start(generationRequest(request), context.signal);
      // The id comes first, so that a client can cancel before there is text.
      yield { requestId: generation.requestId };
      for await (const event of generation.events()) {
        yield { requestId: generation.requestId, event: responseEvent(event) };
      }
    },
    async tokenize(request) {
      return { ids: generator.tokenize(request.model, input(request.input)) };
    },
    async listModels() {
      return {
        models: models().map((model) => ({
          id: model.name,
          digest: model.digestHex,
          kvFormat: model.kvFormat,
          contextTokens: model.contextTokens,
          createdUnixSeconds: BigInt(model.createdUnixSeconds),
        })),
      };
    },
    async cancel(request) {
      return { found: cancel(request.requestId) };
    },
  });
}

function generationRequest(request: GenerateRequest): GenerationRequest {
  const { sampling } = request;
  const fields = parseRequest(samplingSchema, {
    temperature: sampling?.temperature,
    top_p: sampling?.topP,
    top_k: sampling?.topK,
    max_tokens: request.maxTokens,
    stop: request.stop,
    cache_salt: request.cacheSalt,
  });
  return {
    model: request.model,
    input: input(request.input),
    maxTokens: fields.max_tokens,
    temperature: fields.temperature,
    topP: fields.top_p,
    topK: fields.top_k,
    seed: sampling?.seed,
    stop: fields.stop,
    ignoreEos: request.ignoreEos,
    cacheSalt: fields.cache_salt,
    returnFirstLogits: request.returnFirstLogits,
    workerId: request.workerId,
    clientRequestId: request.clientRequestId,
  };
}

type WireInput =
  | { case: "prompt" | "text"; value: string }
  | { case: "chat"; value: Chat }
  | { case: "tokens"; value: { ids: readonly number[] } }
  | { case: undefined; value?: undefined };

function input(wire: WireInput): GenerationInput {
  switch (wire.case) {
    case "prompt":
    case "text":
      return { kind: "text", text: wire.value };
    case "chat":
      if (wire.value.messages.length === 0) {
        throw new ClusterError("INVALID_ARGUMENT", "messages: must have at least one message", {
          parameter: "messages",
        });
      }
      return { kind: "chat", turns: wire.value.messages.map(({ role, content }) => ({ role, content })) };
    case "tokens":
      return { kind: "tokens", ids: wire.value.ids };
    default:
      throw new ClusterError("INVALID_ARGUMENT", "input: give a prompt, a chat or tokens", { parameter: "input" });
  }
}

function responseEvent(event: GenerationEvent) {
  if (event.kind === "finish") {
    return { case: "finish" as const, value: { reason: reasons[event.reason], usage: event.usage } };
  }
  const { text, tokenIds, firstLogits } = event;
  return {
    case: "delta" as const,
    value: { text, tokenIds: [...tokenIds], ...(firstLogits === undefined ? {} : { firstLogits }) },
  };
}
