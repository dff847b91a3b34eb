/** One step on the GPU: decode phase, prefill phase, one submit, one readback. */
import { setTimeout as sleep } from "node:timers/promises";
import { type Gpu, type KvLayer, SAMPLE_RESULT_BYTES } from "@kivimesh/kernels";
import { ClusterError } from "@kivimesh/proto";
import type { ModelConfig } from "../model/model-config.ts";
import type { Activations } from "./activations.ts";
import type { BlockTransfer } from "./block-transfer.ts";
import { gentleWait } from "./gentle-wait.ts";
import type { KvCache } from "./kv-cache.ts";
import type { LayerStack } from "./layer-stack.ts";
import type { MemoryAccount } from "./memory-account.ts";
import type {
  DecodeRow,
  KvGeometry,
  ModelRunner,
  PrefillChunk,
  RunnerDevice,
  RunnerLimits,
  RunnerMemory,
  SampledToken,
  StepPlan,
  StepResult,
} from "./model-runner.ts";
import type { HeadCopies, HeadRow, OutputHead } from "./output-head.ts";
import type { PromptScorer } from "./prompt-scoring.ts";
import { checkStep } from "./step-check.ts";
import type { StepReadback } from "./step-readback.ts";

/** Everything that a runner is made of; see open-model-runner.ts. */
export interface RunnerParts {
  readonly gpu: Gpu;
  readonly ownsGpu: boolean;
  readonly config: ModelConfig;
  readonly kv: KvGeometry;
  readonly limits: RunnerLimits;
  readonly memory: MemoryAccount;
  readonly activations: Activations;
  readonly cache: KvCache;
  readonly blocks: BlockTransfer;
  readonly prefill: { readonly stack: LayerStack; readonly head: OutputHead };
  readonly decode: { readonly stack: LayerStack; readonly head: OutputHead };
  readonly readback: StepReadback;
  readonly scorer: PromptScorer;
}

/** Rows sampled so far in a step being encoded, over both phases. */
interface Sampling {
  readonly slots: number[];
  /** Row of the logits staging, or undefined. */
  readonly logitsRows: (number | undefined)[];
  logits: number;
}

function note(sampling: Sampling, slot: number, returnLogits: boolean | undefined): void {
  sampling.slots.push(slot);
  sampling.logitsRows.push(returnLogits === true ? sampling.logits++ : undefined);
}

/** How long a failed step waits for the news that the device is lost. */
const LOST_GRACE_MILLISECONDS = 100;

function deviceLost(reason: string, cause?: unknown): ClusterError {
  return new ClusterError("DEVICE_LOST", `GPU lost: ${reason}`, { cause });
}

export class GpuModelRunner implements ModelRunner {
  readonly #parts: RunnerParts;
  #busy = false;
  #lost: string | undefined;
  #gpuError: string | undefined;

  constructor(parts: RunnerParts) {
    this.#parts = parts;
    void parts.gpu.lost.then((reason) => {
      this.#lost = reason;
    });
    parts.gpu.device.addEventListener("uncapturederror", this.#noteGpuError);
  }

  readonly #noteGpuError = (event: Event): void => {
    this.#gpuError ??= (event as GPUUncapturedErrorEvent).error.message;
  };

  get config(): ModelConfig {
    return this.#parts.config;
  }

  get kv(): KvGeometry {
    return this.#parts.kv;
  }

  get limits(): RunnerLimits {
    return this.#parts.limits;
  }

  get device(): RunnerDevice {
    const { name, profile, features } = this.#parts.gpu;
    return { name, profile, features };
  }

  get lost(): Promise<string> {
    return this.#parts.gpu.lost;
  }

  memory(): RunnerMemory {
    return this.#parts.memory.total();
  }

  async step(plan: StepPlan): Promise<StepResult> {
    if (this.#busy) throw new ClusterError("INTERNAL", "a step was started before the previous one ended");
    checkStep(plan, this.limits, this.kv);
    if (this.#lost !== undefined) throw deviceLost(this.#lost);
    this.#busy = true;
    try {
      return await this.#run(plan);
    } catch (error) {
      throw await this.#explain(error);
    } finally {
      this.#busy = false;
    }
  }

  async readBlock(page: number): Promise<Uint8Array> {
    try {
      return await this.#parts.blocks.read(page);
    } catch (error) {
      throw await this.#explain(error);
    }
  }

  writeBlock(page: number, payload: Uint8Array): void {
    this.#parts.blocks.write(page, payload);
  }

  async close(): Promise<void> {
    const { gpu, memory, ownsGpu } = this.#parts;
    if (this.#lost === undefined) await gpu.device.queue.onSubmittedWorkDone();
    gpu.device.removeEventListener("uncapturederror", this.#noteGpuError);
    memory.destroy();
    if (ownsGpu) await gpu.close();
  }

  /** A lost device first shows as some other failure; the reason follows soon after. */
  async #explain(error: unknown): Promise<unknown> {
    if (error instanceof ClusterError) return error;
    const reason = await Promise.race([this.#parts.gpu.lost, sleep(LOST_GRACE_MILLISECONDS, undefined)]);
    return reason === undefined ? error : deviceLost(reason, error);
  }

  async #run({ prefill, decode }: StepPlan): Promise<StepResult> {
    const started = performance.now();
    const { gpu, cache, readback, scorer } = this.#parts;
    for (const { slot, pageTable } of [...prefill, ...decode]) cache.setPages(slot, pageTable);
    const encoder = gpu.device.createCommandEncoder();
    const sampling: Sampling = { slots: [], logitsRows: [], logits: 0 };
    // Prefill comes last: its rows of the residual stream stay for scoring.
    if (decode.length > 0) this.#encodeDecode(encoder, decode, sampling);
    if (prefill.length > 0) this.#encodePrefill(encoder, prefill, sampling);
    readback.encodeStatus(encoder, cache.kernels.status);
    gpu.device.queue.submit([encoder.finish()]);
    const encoded = performance.now();
    const results = readback.read(sampling.slots.length, sampling.logits);
    const { sampled, status, logits } = await gentleWait(results, gpu.profile === "software");
    if (this.#gpuError !== undefined) throw new ClusterError("INTERNAL", `GPU error: ${this.#gpuError}`);
    const scores: { slot: number; logprobs: Float32Array }[] = [];
    let row = 0;
    for (const { slot, tokens, score } of prefill) {
      if (score !== undefined) scores.push({ slot, logprobs: await scorer.score(row, score) });
      row += tokens.length;
    }
    const failed = new Set<number>();
    status.forEach((bits, slot) => {
      if (bits === 0) return;
      failed.add(slot);
      cache.kernels.clearStatus(slot);
    });
    const tokens = sampled.map(({ token, logprob, nonFinite }, index): SampledToken => {
      const slot = sampling.slots[index] as number;
      if (nonFinite) failed.add(slot);
      const logitsRow = sampling.logitsRows[index];
      const row = logitsRow === undefined ? undefined : logits[logitsRow];
      return { slot, token, logprob, ...(row === undefined ? {} : { logits: row }) };
    });
    const ended = performance.now();
    return {
      // Decode rows were sampled first on the GPU; callers see plan order.
      sampled: [...tokens.slice(decode.length), ...tokens.slice(0, decode.length)],
      scores,
      nonFiniteSlots: [...failed],
      seconds: { encode: (encoded - started) / 1000, wall: (ended - started) / 1000 },
    };
  }

  #encodeDecode(encoder: GPUCommandEncoder, rows: readonly DecodeRow[], sampling: Sampling): void {
    const { gpu, cache, activations, decode } = this.#parts;
    const { kernels, layers } = cache;
    const window = this.kv.residualTokens;
    gpu.device.queue.writeBuffer(
      activations.decodeTokens,
      0,
      Uint32Array.from(rows, ({ token }) => token),
    );
    const plan = kernels.prepareDecode(rows);
    const full = rows.filter(({ position }) => (position + 1) % window === 0);
    const headRows = rows.map(({ sample, position }, row): HeadRow => ({ row, sample, position: position + 1 }));
    const pass = encoder.beginComputePass();
    decode.stack.encode(pass, rows.length, (layer) => layer.encodeDecode(pass, plan));
    if (full.length > 0) {
      const windows = full.map(({ slot, position }) => ({ slot, position: position + 1 - window }));
      const seal = kernels.prepareSeal(windows);
      for (const layer of layers) layer.encodeSeal(pass, seal);
    }
    pass.end();
    for (const { slot, returnLogits } of rows) note(sampling, slot, returnLogits);
    this.#encodeHead(encoder, decode.head, headRows, sampling);
  }

  #encodePrefill(encoder: GPUCommandEncoder, chunks: readonly PrefillChunk[], sampling: Sampling): void {
    const { gpu, cache, activations, prefill } = this.#parts;
    const headRows: HeadRow[] = [];
    let rows = 0;
    for (const { slot, tokens, position, sample, returnLogits } of chunks) {
      gpu.device.queue.writeBuffer(activations.prefillTokens, rows * 4, tokens as Uint32Array<ArrayBuffer>);
      rows += tokens.length;
      if (sample === undefined) continue;
      headRows.push({ row: rows - 1, sample, position: position + tokens.length });
      note(sampling, slot, returnLogits);
    }
    const plan = cache.kernels.preparePrefill(
      chunks.map(({ slot, position, tokens }) => ({ slot, position, tokens: tokens.length })),
    );
    const pass = encoder.beginComputePass();
    const attend = (layer: KvLayer) => layer.encodePrefill(pass, plan);
    prefill.stack.encode(pass, rows, attend);
    pass.end();
    this.#encodeHead(encoder, prefill.head, headRows, sampling);
  }

  /** @param rows the phase's rows, which are the last ones noted in `sampling`. */
  #encodeHead(encoder: GPUCommandEncoder, head: OutputHead, rows: readonly HeadRow[], sampling: Sampling): void {
    if (rows.length === 0) return;
    const { readback } = this.#parts;
    const first = sampling.slots.length - rows.length;
    const resultsOffset = first * SAMPLE_RESULT_BYTES;
    const asked = sampling.logitsRows.slice(first).some((row) => row !== undefined);
    const logitsOffset = (row: number) => {
      const target = sampling.logitsRows[first + row];
      return target === undefined ? undefined : target * readback.logitsRowBytes;
    };
    const copies: HeadCopies = { staging: readback.results, resultsOffset };
    head.prepare(rows);
    head.encode(encoder, rows.length, asked ? { ...copies, logitsStaging: readback.logits, logitsOffset } : copies);
  }
}
