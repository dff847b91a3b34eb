/** Clients that we did not write: the `openai` package, and gRPC stubs that Python's grpcio-tools makes from our .proto. */
import { execFile } from "node:child_process";
import { mkdtemp } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import OpenAI from "openai";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Cluster, type GatewayHandle, TEST_MODEL } from "./cluster.ts";

const run = promisify(execFile);
const PYTHON = process.env.KIVIMESH_TEST_PYTHON ?? "python3";

describe("clients of others", () => {
  let cluster: Cluster;
  let gateway: GatewayHandle;

  beforeAll(async () => {
    cluster = await Cluster.start();
    await cluster.worker("c", undefined);
    gateway = await cluster.gateway();
  }, 300_000);

  afterAll(async () => {
    await cluster[Symbol.asyncDispose]();
  });

  it("streams a chat completion to the openai package and lists models", async () => {
    const client = new OpenAI({ baseURL: `${gateway.httpUrl}/v1`, apiKey: "unused" });
    const models = await client.models.list();
    expect(models.data.map((model) => model.id)).toContain(TEST_MODEL);
    const stream = await client.chat.completions.create({
      model: TEST_MODEL,
      messages: [{ role: "user", content: "What is the capital of France? Answer in one short sentence." }],
      stream: true,
      stream_options: { include_usage: true },
      temperature: 0,
      max_tokens: 24,
    });
    let text = "";
    let usage: OpenAI.CompletionUsage | undefined;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    expect(text).toContain("Paris");
    expect(usage?.prompt_tokens_details?.cached_tokens).toBe(0);
    expect(usage).toMatchObject({
      kivimesh: { worker: "c", promptTokensBySource: { computed: usage?.prompt_tokens } },
    });
  });

  it("generates for a Python client made from our .proto files", async () => {
    const stubs = await mkdtemp(join(tmpdir(), "kivimesh-python-"));
    const protos = fileURLToPath(new URL("../../proto", import.meta.url));
    const files = ["inference", "usage"].map((name) => join(protos, "kivimesh/v1", `${name}.proto`));
    await run(PYTHON, [
      "-m",
      "grpc_tools.protoc",
      `-I${protos}`,
      `--python_out=${stubs}`,
      `--grpc_python_out=${stubs}`,
      ...files,
    ]);
    const script = fileURLToPath(new URL("../python/generate.py", import.meta.url));
    const { stdout } = await run(PYTHON, [script, stubs, gateway.grpcAddress, "The capital of France is"]);
    const answer = JSON.parse(stdout) as { text: string; promptTokens: number; worker: string };
    expect(answer.text).toContain("Paris");
    expect(answer.worker).toBe("c");
    expect(answer.promptTokens).toBeGreaterThan(3);
  });
});
