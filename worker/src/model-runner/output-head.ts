/** From the residual stream to sampled tokens: gather the wanted rows, final norm, head, sampler; in slabs of rows. */
import {
  type BoundRmsNorm,
  type BoundSampler,
  type BoundTokenStore,
  createRmsNorm,
  createSampler,
  type Gpu,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
  type Sampler,
  type TokenFeedback,
  writeSampleParameters,
} from "@kivimesh/kernels";
import type { ModelConfig } from "../model/model-config.ts";
import type { Activations } from "./activations.ts";
import { logitsRows } from "./logits-rows.ts";
import type { MemoryAccount } from "./memory-account.ts";
import type { SamplingParameters } from "./model-runner.ts";
import type { ModelWeights } from "./model-weights.ts";
import { type BoundStackedLinear, bindStackedLinear, type LinearSettings, type Phase } from "./stacked-linear.ts";
import type { StepPass } from "./step-pass.ts";

/** What both phases share. */
export interface HeadScratch {
  /** f32 [slabRows][vocabulary]. */
  readonly logits: GPUBuffer;
  /** Rows of the residual stream that one pass takes through the head. */
  readonly slabRows: number;
  readonly sampler: Sampler;
}

export async function createHeadScratch(
  gpu: Gpu,
  memory: MemoryAccount,
  vocabulary: number,
  maxRows: number,
): Promise<HeadScratch> {
  const slabRows = logitsRows(gpu.device.limits, gpu.profile, vocabulary, maxRows);
  return {
    logits: memory.storage("activations", "logits", slabRows * vocabulary * 4),
    slabRows,
    sampler: await createSampler(gpu, { vocabulary, maxRows: slabRows }),
  };
}

/** A row of the residual stream that the next token is sampled from. */
export interface HeadRow {
  readonly row: number;
  readonly sample: SamplingParameters;
  /** Position of the token that is drawn. */
  readonly position: number;
}

interface Slab {
  readonly rowIndices: GPUBuffer;
  readonly parameters: GPUBuffer;
  readonly results: GPUBuffer;
  readonly norm: BoundRmsNorm;
  readonly sampler: BoundSampler;
  readonly store: BoundTokenStore;
}

/** Row r's logits go to `staging` at offset(r), where that is not undefined. */
export interface LogitsCopies {
  readonly staging: GPUBuffer;
  offset(row: number): number | undefined;
}

/** The head of one phase: prefill rows take the prefill matrix product, decode rows the decode one. */
export class OutputHead {
  readonly #gpu: Gpu;
  readonly #vocabulary: number;
  readonly #scratch: HeadScratch;
  readonly #linear: BoundStackedLinear;
  readonly #slabs: readonly Slab[];
  readonly #indices: Uint32Array<ArrayBuffer>;
  readonly #parameters: DataView<ArrayBuffer>;

  constructor(gpu: Gpu, vocabulary: number, scratch: HeadScratch, linear: BoundStackedLinear, slabs: readonly Slab[]) {
    this.#gpu = gpu;
    this.#vocabulary = vocabulary;
    this.#scratch = scratch;
    this.#linear = linear;
    this.#slabs = slabs;
    this.#indices = new Uint32Array(scratch.slabRows);
    this.#parameters = new DataView(new ArrayBuffer(scratch.slabRows * SAMPLE_PARAMETER_BYTES));
  }

  get slabRows(): number {
    return this.#scratch.slabRows;
  }

  /** Uploads which rows to take and how to sample them; before `encode`. */
  prepare(rows: readonly HeadRow[]): void {
    const { queue } = this.#gpu.device;
    for (let first = 0; first < rows.length; first += this.slabRows) {
      const slab = this.#slab(first);
      const count = Math.min(this.slabRows, rows.length - first);
      for (let i = 0; i < count; i++) this.#prepareRow(i, rows[first + i] as HeadRow);
      queue.writeBuffer(slab.rowIndices, 0, this.#indices, 0, count);
      queue.writeBuffer(slab.parameters, 0, this.#parameters.buffer, 0, count * SAMPLE_PARAMETER_BYTES);
    }
  }

  #prepareRow(index: number, { row, sample, position }: HeadRow): void {
    const { temperature, topK, topP, seed } = sample;
    this.#indices[index] = row;
    // Greedy rows draw no random number; taking a bigint apart is slow where rows are many.
    const seedLow = temperature === 0 ? 0 : Number(seed & 0xffff_ffffn);
    const seedHigh = temperature === 0 ? 0 : Number((seed >> 32n) & 0xffff_ffffn);
    writeSampleParameters(this.#parameters, index, { temperature, topK, topP, seedLow, seedHigh, position });
  }

  /**
   * Encodes head and sampler for the first `rows` prepared rows; their tokens are what the slots' next rows read. Encoded
   * again, it samples at the next position.
   * @param log entry of the log where the results begin.
   */
  encode(step: StepPass, rows: number, log: number, copies?: LogitsCopies): void {
    const logitsBytes = this.#vocabulary * 4;
    for (let first = 0; first < rows; first += this.slabRows) {
      const slab = this.#slab(first);
      const count = Math.min(this.slabRows, rows - first);
      const { pass } = step;
      slab.norm.encode(pass, count);
      this.#linear.encode(pass, count);
      slab.sampler.encode(pass, count);
      slab.store.encode(pass, first, count, log);
      if (copies === undefined) continue;
      step.end();
      for (let i = 0; i < count; i++) {
        const target = copies.offset(first + i);
        if (target === undefined) continue;
        const { logits } = this.#scratch;
        step.encoder.copyBufferToBuffer(logits, i * logitsBytes, copies.staging, target, logitsBytes);
      }
    }
  }

  /** Encodes the logits of `count` consecutive rows, at most a slab, and their copy into `staging`. For scoring. */
  encodeLogits(encoder: GPUCommandEncoder, firstRow: number, count: number, staging: GPUBuffer): void {
    const [slab] = this.#slabs;
    if (slab === undefined || count > this.slabRows) throw new RangeError(`${count} rows, at most ${this.slabRows}`);
    for (let i = 0; i < count; i++) this.#indices[i] = firstRow + i;
    this.#gpu.device.queue.writeBuffer(slab.rowIndices, 0, this.#indices, 0, count);
    const pass = encoder.beginComputePass();
    slab.norm.encode(pass, count);
    this.#linear.encode(pass, count);
    pass.end();
    encoder.copyBufferToBuffer(this.#scratch.logits, 0, staging, 0, count * this.#vocabulary * 4);
  }

  #slab(first: number): Slab {
    const slab = this.#slabs[first / this.slabRows];
    if (slab !== undefined) return slab;
    throw new RangeError(`over ${this.#slabs.length * this.slabRows} rows for the head`);
  }
}

/** Where sampled tokens go on the GPU; see TokenStoreBuffers. */
export interface HeadFeedback {
  readonly kernels: TokenFeedback;
  readonly rows: GPUBuffer;
  readonly slotTokens: GPUBuffer;
  readonly tokens: GPUBuffer;
  readonly log: GPUBuffer;
}

export interface OutputHeadDescriptor {
  readonly config: ModelConfig;
  readonly weights: ModelWeights;
  readonly activations: Activations;
  readonly settings: LinearSettings;
  readonly scratch: HeadScratch;
  readonly phase: Phase;
  /** Most rows sampled in a step of this phase. */
  readonly maxRows: number;
  readonly feedback: HeadFeedback;
}

export async function createOutputHead(
  gpu: Gpu,
  memory: MemoryAccount,
  descriptor: OutputHeadDescriptor,
): Promise<OutputHead> {
  const { config, weights, activations, settings, scratch, phase, maxRows, feedback } = descriptor;
  const { slabRows, logits } = scratch;
  const { hidden, normed } = activations;
  const [norm, linear] = await Promise.all([
    createRmsNorm(gpu, { hidden: config.hidden, epsilon: config.normEpsilon, output: activations.type }),
    bindStackedLinear(gpu, {
      weight: weights.head,
      settings,
      phase,
      maxRows: slabRows,
      input: normed,
      output: logits,
    }),
  ]);
  const slabs: Slab[] = [];
  for (let first = 0; first < maxRows; first += slabRows) {
    const storage = (label: string, bytes: number) => memory.storage("other", `${phase} head ${label}`, bytes);
    const rowIndices = storage("rows", slabRows * 4);
    const parameters = storage("parameters", slabRows * SAMPLE_PARAMETER_BYTES);
    const results = storage("results", slabRows * SAMPLE_RESULT_BYTES);
    slabs.push({
      rowIndices,
      parameters,
      results,
      norm: norm.bind({ input: hidden, weight: weights.outputNorm, output: normed, rowIndices }),
      sampler: scratch.sampler.bind({ logits, parameters, output: results }),
      store: feedback.kernels.bindStore({ ...feedback, results, parameters }),
    });
  }
  return new OutputHead(gpu, config.vocabulary, scratch, linear, slabs);
}
