/** An engine in this thread, for benches, evaluation and tests. */
import { randomUUID } from "node:crypto";
import { type Gpu, openGpu, selfTest } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { BlockTransfer } from "./block-transfer.ts";
import { checkEngineConfig, type EngineConfig } from "./config.ts";
import { Engine } from "./engine.ts";
import type { EngineOptions } from "./engine-options.ts";
import type { EngineStats } from "./engine-stats.ts";
import { EventChannel } from "./event-channel.ts";
import { type GenerationEvent, type GenerationRequest, greedySampling } from "./generation.ts";
import {
  type LoadedModel,
  loadModel,
  type ModelRunner,
  openModelRunner,
  type SamplingParameters,
} from "./model/index.ts";

/** Prefill rows of a step where the configuration names none: a software driver takes seconds for these already. */
const prefillRows = { software: 128, hardware: 1024 };

/** Steps without prefill between two with it, while something decodes: how far prefill may slow a running stream. */
const decodeStepsPerPrefill = { software: 4, hardware: 1 };

/** See EngineOptions. A software driver is slower than the host, and shares its cores. */
const decodeStepsPerSubmit = { software: 1, hardware: 8 };
const submitsInFlight = { software: 1, hardware: 2 };
const submitLatencyMs = 30;

/** A generation by token ids; what is left out is greedy, unshared and unlimited in time. */
export interface SimpleGeneration {
  readonly tokens: ArrayLike<number>;
  /** New tokens, at most. */
  readonly maxTokens: number;
  readonly sampling?: Partial<SamplingParameters>;
  readonly stopTokenIds?: readonly number[];
  readonly returnFirstLogits?: boolean;
  /** Part of every block id; default 32 zero bytes. */
  readonly tenantNamespace?: Uint8Array;
  readonly requestId?: string;
  readonly epoch?: number;
  /** Default: all of `tokens`. */
  readonly promptTokens?: number;
}

export interface OpenEngine {
  readonly model: LoadedModel;
  readonly runner: ModelRunner;
  readonly engine: Engine;
  /** Events of one request; ends after "finished". Leaving the loop early aborts the request. */
  generate(request: SimpleGeneration): AsyncGenerator<GenerationEvent, void, undefined>;
  stats(): EngineStats;
  close(): Promise<void>;
}

/** A loaded model on the GPU with the engine's defaults for its device filled in. */
export interface EngineParts {
  readonly model: LoadedModel;
  readonly gpu: Gpu;
  readonly options: Pick<
    EngineOptions,
    | "runner"
    | "modelDigest"
    | "numerics"
    | "maxPrefillRows"
    | "decodeStepsPerPrefill"
    | "prefillPatience"
    | "decodeStepsPerSubmit"
    | "submitLatencyMs"
    | "submitsInFlight"
  >;
}

/** Loads a model and puts it on the GPU. @throws ClusterError as `loadModel` and `openModelRunner`. */
export async function openEngineParts(
  config: EngineConfig,
  onProgress?: (done: number, total: number) => void,
): Promise<EngineParts> {
  checkEngineConfig(config);
  const { modelPath, dummyArchitecture, modelName } = config;
  const model = await loadModel(
    modelPath === undefined
      ? { dummy: dummyArchitecture!, ...present({ seed: config.dummySeed }) }
      : { path: modelPath, ...present({ name: modelName }) },
  );
  const gpu = await openAdapter(config.gpuAdapter);
  const { maxSequences, kvFormat, blockTokens, residualTokens, kvBytes, maxContextTokens } = config;
  const rows = config.maxPrefillRows ?? Math.max(prefillRows[gpu.profile], residualTokens ?? 0);
  const sizes = present({ maxSequences, kvFormat, blockTokens, residualTokens, kvBytes, maxContextTokens });
  const runner = await openModelRunner({
    model,
    gpu,
    maxPrefillRows: rows,
    ...sizes,
    ...present({ onProgress, numerics: config.numerics }),
  });
  return {
    model,
    gpu,
    options: {
      runner,
      modelDigest: model.digest,
      numerics: config.numerics ?? "invariant",
      maxPrefillRows: runner.limits.maxPrefillRows,
      decodeStepsPerPrefill: config.decodeStepsPerPrefill ?? decodeStepsPerPrefill[gpu.profile],
      prefillPatience: config.prefillPatience ?? 0,
      decodeStepsPerSubmit: config.decodeStepsPerSubmit ?? decodeStepsPerSubmit[gpu.profile],
      submitLatencyMs: config.submitLatencyMs ?? submitLatencyMs,
      submitsInFlight: config.submitsInFlight ?? submitsInFlight[gpu.profile],
    },
  };
}

/** Loads a model onto the GPU and starts an engine over it. @throws ClusterError as `loadModel` and `openModelRunner`. */
export async function openEngine(
  config: EngineConfig,
  onProgress?: (done: number, total: number) => void,
  transfer?: BlockTransfer,
): Promise<OpenEngine> {
  const { model, gpu, options } = await openEngineParts(config, onProgress);
  const channels = new Map<string, EventChannel<GenerationEvent>>();
  const engine = new Engine({
    ...options,
    ...present({ transfer }),
    onEvents: (events) => {
      for (const event of events) channels.get(key(event))?.push(event);
    },
    onFailure: (error) => {
      for (const channel of channels.values()) channel.fail(error);
    },
  });
  return {
    model,
    runner: options.runner,
    engine,
    async *generate(simple) {
      const request = fullRequest(simple);
      const channel = new EventChannel<GenerationEvent>();
      if (channels.has(key(request))) {
        throw new ClusterError("INVALID_ARGUMENT", `request ${request.requestId} is running already`);
      }
      channels.set(key(request), channel);
      let ended = false;
      try {
        engine.submit(request);
        for await (const event of channel) {
          ended = event.type === "finished";
          yield event;
          if (ended) return;
        }
      } finally {
        channels.delete(key(request));
        if (!ended) engine.abort(request.requestId, request.epoch);
      }
    },
    stats: () => engine.stats(),
    async close() {
      await engine.close();
      await gpu.close();
      model.close();
    },
  };
}

function key({ requestId, epoch }: { readonly requestId: string; readonly epoch: number }): string {
  return `${requestId}.${epoch}`;
}

function fullRequest(simple: SimpleGeneration): GenerationRequest {
  return {
    requestId: simple.requestId ?? randomUUID(),
    epoch: simple.epoch ?? 0,
    tokens: Uint32Array.from(simple.tokens),
    promptTokens: simple.promptTokens ?? simple.tokens.length,
    maxTokens: simple.maxTokens,
    sampling: { ...greedySampling, ...simple.sampling },
    stopTokenIds: simple.stopTokenIds ?? [],
    tenantNamespace: simple.tenantNamespace ?? new Uint8Array(32),
    deadlineUnixMs: 0,
    returnFirstLogits: simple.returnFirstLogits ?? false,
  };
}

async function openAdapter(adapter: string | undefined) {
  try {
    return await selfTest(await openGpu(adapter === undefined ? {} : { adapter }));
  } catch (error) {
    const message = error instanceof Error ? error.message : String(error);
    throw new ClusterError("GPU_UNAVAILABLE", message, { cause: error });
  }
}

/** Without the undefined values. */
function present<T extends object>(values: T): { [K in keyof T]?: Exclude<T[K], undefined> } {
  const entries = Object.entries(values).filter(([, value]) => value !== undefined);
  return Object.fromEntries(entries) as { [K in keyof T]?: Exclude<T[K], undefined> };
}
