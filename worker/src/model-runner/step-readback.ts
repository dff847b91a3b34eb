/** Brings a step's results to the host: sampled tokens, KV status and GPU times in one mapped buffer, logits where asked for. */
import { readSampleResult, SAMPLE_RESULT_BYTES, type SampleResult } from "@kivimesh/kernels";
import type { MemoryAccount } from "./memory-account.ts";
import type { RunnerLimits } from "./model-runner.ts";

const STAMP_BYTES = 8;
/** Begin and end of a step's pass. */
const STAMPS = 2;

/** Where one step's results go; free again after `read`. */
export interface ReadbackEntry {
  readonly results: GPUBuffer;
  /** Where the pass writes its begin (0) and end (1); undefined where the device has no timestamps. */
  readonly querySet: GPUQuerySet | undefined;
  readonly resolved: GPUBuffer | undefined;
  /** f32 [rows asked for so far][vocabulary]; made at first use, because few ever ask. */
  logits: GPUBuffer | undefined;
}

export interface StepOutcome {
  readonly sampled: readonly SampleResult[];
  /** By slot: KV_STATUS_* bits. */
  readonly status: Uint32Array;
  readonly logits: readonly Float32Array[];
  readonly gpuSeconds: number | undefined;
}

export class StepReadback {
  readonly #memory: MemoryAccount;
  readonly #limits: RunnerLimits;
  readonly #free: ReadbackEntry[] = [];
  readonly #log: GPUBuffer;
  readonly #statusOffset: number;
  readonly #stampOffset: number;

  /** @param device where it has timestamps. */
  constructor(memory: MemoryAccount, limits: RunnerLimits, device: GPUDevice | undefined) {
    this.#memory = memory;
    this.#limits = limits;
    const { maxSequences, maxDecodeSteps, maxStepsInFlight } = limits;
    const resultBytes = maxSequences * maxDecodeSteps * SAMPLE_RESULT_BYTES;
    this.#statusOffset = resultBytes;
    this.#stampOffset = Math.ceil((resultBytes + maxSequences * 4) / STAMP_BYTES) * STAMP_BYTES;
    this.#log = memory.storage("other", "step results", resultBytes);
    for (let entry = 0; entry < maxStepsInFlight; entry++) {
      const results = memory.staging("other", "step results", this.#stampOffset + STAMPS * STAMP_BYTES);
      this.#free.push({ results, logits: undefined, ...stamps(memory, device) });
    }
  }

  /** Results of all rows and steps, SAMPLE_RESULT_BYTES each, on the GPU. */
  get log(): GPUBuffer {
    return this.#log;
  }

  /** Staging for `rows` rows of logits. */
  logits(entry: ReadbackEntry, rows: number): GPUBuffer {
    const bytes = rows * this.logitsRowBytes;
    if (entry.logits !== undefined && entry.logits.size >= bytes) return entry.logits;
    if (entry.logits !== undefined) this.#memory.release("other", entry.logits);
    entry.logits = this.#memory.staging("other", "logits for the host", bytes);
    return entry.logits;
  }

  get logitsRowBytes(): number {
    return this.#limits.vocabulary * 4;
  }

  /** @throws RangeError where as many steps are under way as there may be. */
  take(): ReadbackEntry {
    const entry = this.#free.shift();
    if (entry === undefined) throw new RangeError(`more than ${this.#limits.maxStepsInFlight} steps under way`);
    return entry;
  }

  /** Frees the entry of a step that was not submitted. */
  give(entry: ReadbackEntry): void {
    this.#free.push(entry);
  }

  /** Copies what the step left: `rows` results, the status words, which start anew, and the times. */
  encodeCopies(
    encoder: GPUCommandEncoder,
    entry: ReadbackEntry,
    rows: number,
    status: GPUBuffer,
    timed: boolean,
  ): void {
    const { results, querySet, resolved } = entry;
    if (rows > 0) encoder.copyBufferToBuffer(this.#log, 0, results, 0, rows * SAMPLE_RESULT_BYTES);
    const statusBytes = this.#limits.maxSequences * 4;
    encoder.copyBufferToBuffer(status, 0, results, this.#statusOffset, statusBytes);
    encoder.clearBuffer(status, 0, statusBytes);
    if (!timed || querySet === undefined || resolved === undefined) return;
    encoder.resolveQuerySet(querySet, 0, STAMPS, resolved, 0);
    encoder.copyBufferToBuffer(resolved, 0, results, this.#stampOffset, STAMPS * STAMP_BYTES);
  }

  /** Waits for the submitted step, and frees its entry. @param rows sampled rows. @param logitsRows rows of logits copied. */
  async read(entry: ReadbackEntry, rows: number, logitsRows: number, timed: boolean): Promise<StepOutcome> {
    const waits = [entry.results.mapAsync(GPUMapMode.READ)];
    const logits = logitsRows > 0 ? entry.logits : undefined;
    if (logits !== undefined) waits.push(logits.mapAsync(GPUMapMode.READ, 0, logitsRows * this.logitsRowBytes));
    await Promise.all(waits);
    const mapped = entry.results.getMappedRange();
    const view = new DataView(mapped);
    const sampled: SampleResult[] = [];
    for (let row = 0; row < rows; row++) sampled.push(readSampleResult(view, row));
    const status = new Uint32Array(mapped, this.#statusOffset, this.#limits.maxSequences).slice();
    const nanoseconds =
      view.getBigUint64(this.#stampOffset + STAMP_BYTES, true) - view.getBigUint64(this.#stampOffset, true);
    entry.results.unmap();
    const logitsOnHost = logits === undefined ? [] : this.#readLogits(logits, logitsRows);
    this.give(entry);
    const gpuSeconds = timed && entry.querySet !== undefined ? Number(nanoseconds) / 1e9 : undefined;
    return { sampled, status, logits: logitsOnHost, gpuSeconds };
  }

  #readLogits(staging: GPUBuffer, rows: number): Float32Array[] {
    const { vocabulary } = this.#limits;
    const all = new Float32Array(staging.getMappedRange(0, rows * this.logitsRowBytes));
    const logits: Float32Array[] = [];
    for (let row = 0; row < rows; row++) logits.push(all.slice(row * vocabulary, (row + 1) * vocabulary));
    staging.unmap();
    return logits;
  }
}

function stamps(memory: MemoryAccount, device: GPUDevice | undefined): Pick<ReadbackEntry, "querySet" | "resolved"> {
  if (device === undefined) return { querySet: undefined, resolved: undefined };
  const querySet = device.createQuerySet({ type: "timestamp", count: STAMPS });
  const usage = GPUBufferUsage.QUERY_RESOLVE | GPUBufferUsage.COPY_SRC;
  const resolved = device.createBuffer({ label: "step times", size: STAMPS * STAMP_BYTES, usage });
  memory.own("other", 0, querySet);
  return { querySet, resolved: memory.add("other", resolved) };
}
