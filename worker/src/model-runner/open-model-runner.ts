/** Puts a loaded model on the GPU. */
import { activationType, DEFAULT_KV_FORMAT, type Gpu, GpuUnavailableError, openGpu, selfTest } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { ModelConfig } from "../model/model-config.ts";
import { createActivations, gateIsFused, usableActivations, withGate } from "./activations.ts";
import { BlockTransfer } from "./block-transfer.ts";
import { GpuModelRunner } from "./gpu-model-runner.ts";
import { createKvCache } from "./kv-cache.ts";
import { kvGeometry, pagesInPool } from "./kv-geometry.ts";
import { createLayerStack } from "./layer-stack.ts";
import { MemoryAccount } from "./memory-account.ts";
import type { KvGeometry, ModelRunner, OpenModelRunnerOptions, RunnerLimits } from "./model-runner.ts";
import { uploadModelWeights } from "./model-weights.ts";
import { createHeadScratch, createOutputHead } from "./output-head.ts";
import { PromptScorer } from "./prompt-scoring.ts";
import type { LinearSettings, Phase } from "./stacked-linear.ts";
import { StepEncoder } from "./step-encoder.ts";
import { StepReadback } from "./step-readback.ts";
import { createTokenTables } from "./token-tables.ts";
import { warmUp } from "./warm-up.ts";

const DEFAULT_WINDOW = 128;
const DEFAULT_SEQUENCES = 8;
const DEFAULT_PREFILL_ROWS = 512;
const DEFAULT_CONTEXT = 8192;
const DEFAULT_DECODE_STEPS = 16;
/** Bounds the tables that are made for so many steps. */
const MAX_DECODE_STEPS = 256;
/** One runs while the next is encoded; the third bridges the time until the first one's result is taken. */
const STEPS_IN_FLIGHT = 3;
/** Rows travel as one dispatch dimension. */
const MAX_ROWS = 65_535;

function positive(parameter: string, value: number, most: number): number {
  if (Number.isInteger(value) && value >= 1 && value <= most) return value;
  throw new ClusterError("INVALID_ARGUMENT", `${parameter} is ${value}; it must be an integer from 1 to ${most}`, {
    parameter,
  });
}

function runnerLimits(gpu: Gpu, config: ModelConfig, kv: KvGeometry, options: OpenModelRunnerOptions): RunnerLimits {
  const context = Math.min(config.contextTokens, DEFAULT_CONTEXT);
  const maxContextTokens = positive("maxContextTokens", options.maxContextTokens ?? context, config.contextTokens);
  const maxSequences = positive("maxSequences", options.maxSequences ?? DEFAULT_SEQUENCES, MAX_ROWS);
  const maxPrefillRows = positive("maxPrefillRows", options.maxPrefillRows ?? DEFAULT_PREFILL_ROWS, MAX_ROWS);
  if (maxPrefillRows < kv.residualTokens) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `maxPrefillRows is ${maxPrefillRows}; a chunk has at least residualTokens = ${kv.residualTokens} rows`,
      { parameter: "maxPrefillRows" },
    );
  }
  const maxPagesPerSequence = Math.ceil(maxContextTokens / kv.blockTokens);
  const numPages = pagesInPool(gpu.device.limits, kv, {
    maxSequences,
    maxPagesPerSequence,
    ...(options.kvBytes === undefined ? {} : { kvBytes: options.kvBytes }),
  });
  return {
    numPages,
    maxSequences,
    maxPrefillRows,
    maxPagesPerSequence,
    maxContextTokens,
    vocabulary: config.vocabulary,
    maxDecodeSteps: positive("maxDecodeSteps", options.maxDecodeSteps ?? DEFAULT_DECODE_STEPS, MAX_DECODE_STEPS),
    maxStepsInFlight: STEPS_IN_FLIGHT,
  };
}

async function openDefaultGpu(): Promise<Gpu> {
  try {
    return await selfTest(await openGpu());
  } catch (error) {
    if (!(error instanceof GpuUnavailableError)) throw error;
    throw new ClusterError("GPU_UNAVAILABLE", error.message, { cause: error });
  }
}

/**
 * Uploads the weights and compiles everything a step needs.
 * @throws ClusterError GPU_UNAVAILABLE, MODEL_UNSUPPORTED, INVALID_ARGUMENT.
 */
export async function openModelRunner(options: OpenModelRunnerOptions): Promise<ModelRunner> {
  const { model, kvFormat = DEFAULT_KV_FORMAT, blockTokens = DEFAULT_WINDOW } = options;
  const residualTokens = options.residualTokens ?? Math.max(DEFAULT_WINDOW, blockTokens);
  const kv = kvGeometry(model.config, kvFormat, blockTokens, residualTokens);
  const gpu = options.gpu ?? (await openDefaultGpu());
  const memory = new MemoryAccount(gpu);
  try {
    const limits = runnerLimits(gpu, model.config, kv, options);
    const runner = await assemble(gpu, memory, kv, limits, options);
    await warmUp(runner);
    return runner;
  } catch (error) {
    memory.destroy();
    if (options.gpu === undefined) await gpu.close();
    if (!(error instanceof RangeError)) throw error;
    throw new ClusterError("INVALID_ARGUMENT", `this GPU cannot run ${model.name}: ${error.message}`, { cause: error });
  }
}

async function assemble(
  gpu: Gpu,
  memory: MemoryAccount,
  kv: KvGeometry,
  limits: RunnerLimits,
  options: OpenModelRunnerOptions,
): Promise<ModelRunner> {
  const { model, gpu: given, onProgress, numerics = "invariant" } = options;
  const { config } = model;
  const { maxPrefillRows, maxSequences, vocabulary } = limits;
  const emulated = options.emulatedMatrices ?? false;
  const type = usableActivations(activationType(gpu, emulated ? "f16" : undefined), config);
  const shape = { type, maxPrefillRows, maxSequences };
  const planned = createActivations(memory, config, { ...shape, fusedGate: type === "f16" });
  const cache = await createKvCache(gpu, memory, { config, kv, limits, activations: planned, numerics });
  const weights = await uploadModelWeights(gpu, memory, model, onProgress);
  const lacksGate = planned.gateUp === undefined && !gateIsFused(weights);
  const activations = lacksGate ? withGate(memory, config, shape, planned) : planned;
  const settings: LinearSettings = { input: type, numerics, dialect: emulated ? "emulated" : "device" };
  const scratch = await createHeadScratch(gpu, memory, vocabulary, maxSequences);
  const readback = new StepReadback(memory, limits, gpu.features.timestampQuery ? gpu.device : undefined);
  const tokens = await createTokenTables(gpu, memory, activations.decodeTokens, readback.log, maxSequences);
  const common = { config, weights, activations, settings, kvLayers: cache.layers, scratch };
  // Drivers compile side by side.
  const phase = async (name: Phase, maxRows: number) => {
    const [stack, head] = await Promise.all([
      createLayerStack(gpu, { ...common, phase: name, maxRows }),
      createOutputHead(gpu, memory, { ...common, phase: name, maxRows: maxSequences, feedback: tokens[name] }),
    ]);
    return { stack, head };
  };
  const [prefill, decode] = await Promise.all([phase("prefill", maxPrefillRows), phase("decode", maxSequences)]);
  return new GpuModelRunner({
    gpu,
    ownsGpu: given === undefined,
    config,
    kv,
    limits,
    memory,
    blocks: new BlockTransfer(gpu, memory, cache, limits.numPages),
    encoder: new StepEncoder({ gpu, activations, cache, tokens, prefill, decode, readback }),
    readback,
    scorer: new PromptScorer(gpu, memory, prefill.head, vocabulary),
  });
}
