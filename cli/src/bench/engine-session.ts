/** One engine in this thread, driven without generators: a bench at tens of thousands of tokens a second notices them. */
import {
  Engine,
  type EngineConfig,
  type GenerationEvent,
  greedySampling,
  type LoadedModel,
  type ModelRunner,
  openEngineParts,
} from "@kivimesh/worker";
import { meteredRunner, type RecordedStep } from "./metered-runner.ts";

export interface SessionRequest {
  readonly id: string;
  readonly tokens: Uint32Array;
  readonly maxTokens: number;
  /** New tokens, and when they came in milliseconds of `performance.now()`: all of one plan at the same time. */
  readonly onTokens: (count: number, at: number) => void;
  /** All tokens came, or the request was aborted. */
  readonly onEnd: () => void;
}

export interface EngineSession {
  readonly model: LoadedModel;
  readonly runner: ModelRunner;
  /** Plans so far; a bench empties it where its own part begins. */
  readonly steps: RecordedStep[];
  /** Rejects when a request or the engine fails. */
  readonly failure: Promise<never>;
  submit(request: SessionRequest): void;
  abort(id: string): void;
  /** Sequences thrown out and started again since the session was opened, for want of pages. */
  preemptions(): number;
  close(): Promise<void>;
}

/**
 * Opens model, GPU and engine.
 * @param config what the engine runs; its benches never stop at a token.
 * @throws ClusterError as `openEngine`.
 */
export async function openSession(
  config: EngineConfig,
  onProgress?: (done: number, total: number) => void,
): Promise<EngineSession> {
  const { model, gpu, options } = await openEngineParts(config, onProgress);
  const steps: RecordedStep[] = [];
  const requests = new Map<string, SessionRequest>();
  let fail: (error: Error) => void = () => undefined;
  const failure = new Promise<never>((_, reject) => {
    fail = reject;
  });
  // Without a listener of its own a failure before anyone waits would end the process.
  failure.catch(() => undefined);
  const handle = (event: GenerationEvent, at: number) => {
    const request = requests.get(event.requestId);
    if (event.type === "tokens") {
      request?.onTokens(event.ids.length, at);
      return;
    }
    requests.delete(event.requestId);
    if (event.outcome === "failed") fail(new Error(`${event.error?.code}: ${event.error?.message}`));
    else request?.onEnd();
  };
  const engine = new Engine({
    ...options,
    runner: meteredRunner(options.runner, (step) => steps.push(step)),
    onEvents(events) {
      const at = performance.now();
      for (const event of events) handle(event, at);
    },
    onFailure: fail,
  });
  return {
    model,
    runner: options.runner,
    steps,
    failure,
    submit(request) {
      requests.set(request.id, request);
      engine.submit({
        requestId: request.id,
        epoch: 0,
        tokens: request.tokens,
        promptTokens: request.tokens.length,
        maxTokens: request.maxTokens,
        sampling: greedySampling,
        stopTokenIds: [],
        tenantNamespace: new Uint8Array(32),
        deadlineUnixMs: 0,
        returnFirstLogits: false,
      });
    },
    abort: (id) => engine.abort(id, 0),
    preemptions: () => engine.stats(false).preemptions,
    async close() {
      await engine.close();
      await gpu.close();
      model.close();
    },
  };
}
