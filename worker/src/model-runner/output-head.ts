/** From the residual stream to sampled tokens: gather the wanted rows, final norm, head, sampler; in slabs of rows. */
import {
  type BoundRmsNorm,
  type BoundSampler,
  createRmsNorm,
  createSampler,
  type Gpu,
  SAMPLE_PARAMETER_BYTES,
  SAMPLE_RESULT_BYTES,
  type Sampler,
  writeSampleParameters,
} from "@kivimesh/kernels";
import type { ModelConfig } from "../model/model-config.ts";
import type { Activations } from "./activations.ts";
import type { MemoryAccount } from "./memory-account.ts";
import type { SamplingParameters } from "./model-runner.ts";
import type { ModelWeights } from "./model-weights.ts";
import { type BoundStackedLinear, bindStackedLinear, type Phase } from "./stacked-linear.ts";

/** Logits of one slab stay within this, and within what the device binds. */
const MAX_LOGITS_BYTES = 64 << 20;

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
  const limit = Math.min(MAX_LOGITS_BYTES, gpu.device.limits.maxStorageBufferBindingSize);
  const slabRows = Math.max(1, Math.min(maxRows, Math.floor(limit / (vocabulary * 4))));
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
}

export interface HeadCopies {
  /** Where the results go: SAMPLE_RESULT_BYTES a row, from `resultsOffset`. */
  readonly staging: GPUBuffer;
  readonly resultsOffset: number;
  /** Row r's logits go to `logitsStaging` at logitsOffset(r), where that is not undefined. */
  readonly logitsStaging?: GPUBuffer;
  logitsOffset?(row: number): number | undefined;
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
    this.#eachSlab(rows.length, (slab, first, count) => {
      for (let i = 0; i < count; i++) {
        const { row, sample, position } = rows[first + i] as HeadRow;
        this.#indices[i] = row;
        writeSampleParameters(this.#parameters, i, {
          temperature: sample.temperature,
          topK: sample.topK,
          topP: sample.topP,
          seedLow: Number(sample.seed & 0xffff_ffffn),
          seedHigh: Number((sample.seed >> 32n) & 0xffff_ffffn),
          position,
        });
      }
      queue.writeBuffer(slab.rowIndices, 0, this.#indices, 0, count);
      queue.writeBuffer(slab.parameters, 0, this.#parameters.buffer, 0, count * SAMPLE_PARAMETER_BYTES);
    });
  }

  /** Encodes head and sampler for the first `rows` prepared rows, and the copies of their results. */
  encode(encoder: GPUCommandEncoder, rows: number, copies: HeadCopies): void {
    const logitsBytes = this.#vocabulary * 4;
    this.#eachSlab(rows, (slab, first, count) => {
      const pass = encoder.beginComputePass();
      slab.norm.encode(pass, count);
      this.#linear.encode(pass, count);
      slab.sampler.encode(pass, count);
      pass.end();
      const offset = copies.resultsOffset + first * SAMPLE_RESULT_BYTES;
      encoder.copyBufferToBuffer(slab.results, 0, copies.staging, offset, count * SAMPLE_RESULT_BYTES);
      if (copies.logitsStaging === undefined) return;
      for (let i = 0; i < count; i++) {
        const target = copies.logitsOffset?.(first + i);
        if (target === undefined) continue;
        encoder.copyBufferToBuffer(this.#scratch.logits, i * logitsBytes, copies.logitsStaging, target, logitsBytes);
      }
    });
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

  #eachSlab(rows: number, visit: (slab: Slab, first: number, count: number) => void): void {
    const { slabRows } = this.#scratch;
    for (let first = 0; first < rows; first += slabRows) {
      const slab = this.#slabs[first / slabRows];
      if (slab === undefined)
        throw new RangeError(`${rows} rows for the head, at most ${this.#slabs.length * slabRows}`);
      visit(slab, first, Math.min(slabRows, rows - first));
    }
  }
}

/** @param maxRows most rows sampled in a step of this phase. */
export async function createOutputHead(
  gpu: Gpu,
  memory: MemoryAccount,
  config: ModelConfig,
  weights: ModelWeights,
  activations: Activations,
  scratch: HeadScratch,
  phase: Phase,
  maxRows: number,
): Promise<OutputHead> {
  const { slabRows, logits } = scratch;
  const { hidden, normed } = activations;
  const norm = await createRmsNorm(gpu, { hidden: config.hidden, epsilon: config.normEpsilon });
  const linear = await bindStackedLinear(gpu, {
    weight: weights.head,
    phase,
    maxRows: slabRows,
    accumulate: false,
    input: normed,
    output: logits,
  });
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
    });
  }
  return new OutputHead(gpu, config.vocabulary, scratch, linear, slabs);
}
