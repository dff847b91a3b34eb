/** One prompt through the public gRPC API, streamed and measured. */
import { create, type MessageInitShape } from "@bufbuild/protobuf";
import { ClusterError, createClient, GenerateRequestSchema, Inference, type Usage } from "@kivimesh/proto";
import { formatBytes, formatTable } from "./output.ts";

/** What a prompt gave. Times are seconds at the client. */
export interface PromptReport {
  readonly model: string;
  readonly device: string;
  readonly kvFormat: string;
  readonly prompt: string;
  readonly text: string;
  readonly promptTokens: number;
  readonly outputTokens: number;
  /** From sending the request to the first token. */
  readonly ttftSeconds: number;
  /** After the first token; for a single one, from the request on. */
  readonly outputTokensPerSecond: number;
  /** KV of prompt and answer: as f16, and as kept. */
  readonly kv: { readonly f16Bytes: number; readonly storedBytes: number };
  readonly promptTokensBySource: {
    readonly gpu: number;
    readonly peer: number;
    readonly cachestore: number;
    readonly computed: number;
  };
}

export interface StreamedAnswer {
  readonly text: string;
  readonly usage: Usage;
  readonly ttftSeconds: number;
  readonly outputTokensPerSecond: number;
}

export type GenerateInit = MessageInitShape<typeof GenerateRequestSchema>;

/**
 * Sends one request to the gateway at `address` (host:port) and calls `onText` at each piece of the answer.
 * @throws ClusterError of the gateway; CANCELLED where the signal is raised.
 */
export async function streamAnswer(
  address: string,
  request: GenerateInit,
  onText: (text: string) => void,
  signal?: AbortSignal,
): Promise<StreamedAnswer> {
  const client = createClient(Inference, address);
  const started = performance.now();
  let firstAt: number | undefined;
  let lastAt = started;
  let text = "";
  try {
    const call = signal === undefined ? {} : { signal };
    for await (const message of client.generate(create(GenerateRequestSchema, request), call)) {
      if (message.event.case === "delta") {
        const { value } = message.event;
        lastAt = performance.now();
        firstAt ??= lastAt;
        text += value.text;
        if (value.text !== "") onText(value.text);
      } else if (message.event.case === "finish") {
        const { usage } = message.event.value;
        if (usage === undefined) throw new ClusterError("INTERNAL", "the gateway ended the stream without usage");
        const ttftSeconds = ((firstAt ?? performance.now()) - started) / 1000;
        const decodeSeconds = (lastAt - (firstAt ?? started)) / 1000;
        const rate =
          usage.completionTokens > 1 && decodeSeconds > 0
            ? (usage.completionTokens - 1) / decodeSeconds
            : usage.completionTokens / ttftSeconds;
        return { text, usage, ttftSeconds, outputTokensPerSecond: rate };
      }
    }
  } catch (error) {
    if (!(error instanceof ClusterError) || error.code !== "UNAVAILABLE" || firstAt !== undefined) throw error;
    const hint = `no gateway answers at ${address}; start one with: npx kivimesh up`;
    throw new ClusterError("UNAVAILABLE", hint, { cause: error });
  } finally {
    client.close();
  }
  throw new ClusterError("INTERNAL", "the gateway's stream ended without a finish");
}

/** The report of an answer. */
export function promptReport(
  answer: StreamedAnswer,
  served: { model: string; device: string; prompt: string },
): PromptReport {
  const { usage } = answer;
  const { kivimesh } = usage;
  if (kivimesh === undefined) throw new ClusterError("INTERNAL", "the usage lacks its kivimesh part");
  const { gpu = 0, peer = 0, cachestore = 0, computed = 0 } = kivimesh.promptTokensBySource ?? {};
  return {
    model: served.model,
    device: served.device,
    kvFormat: kivimesh.kvFormat,
    prompt: served.prompt,
    text: answer.text,
    promptTokens: usage.promptTokens,
    outputTokens: usage.completionTokens,
    ttftSeconds: answer.ttftSeconds,
    outputTokensPerSecond: answer.outputTokensPerSecond,
    kv: { f16Bytes: Number(kivimesh.kvF16Bytes), storedBytes: Number(kivimesh.kvStoredBytes) },
    promptTokensBySource: { gpu, peer, cachestore, computed },
  };
}

/** The report as a table. */
export function formatReport(report: PromptReport): string {
  const { gpu, peer, cachestore, computed } = report.promptTokensBySource;
  const { f16Bytes, storedBytes } = report.kv;
  const ratio = storedBytes > 0 && storedBytes < f16Bytes ? ` (${(f16Bytes / storedBytes).toFixed(2)} times less)` : "";
  return formatTable(
    ["report", ""],
    [
      ["model", report.model],
      ["device", report.device],
      ["tokens", `${report.promptTokens} prompt, ${report.outputTokens} output`],
      ["time to first token", `${report.ttftSeconds.toFixed(2)} s`],
      ["output", `${report.outputTokensPerSecond.toFixed(1)} tokens/s`],
      ["KV as f16", formatBytes(f16Bytes)],
      ["KV as stored", `${formatBytes(storedBytes)}, ${report.kvFormat}${ratio}`],
      ["prompt tokens from", `GPU ${gpu}, peers ${peer}, cachestore ${cachestore}, computed ${computed}`],
    ],
  );
}
