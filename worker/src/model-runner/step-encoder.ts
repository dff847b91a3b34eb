/** Encodes a plan for the GPU: the decode rows' steps, then the prefill rows, into one submit. */
import type { Gpu, KvLayer } from "@kivimesh/kernels";
import type { Activations } from "./activations.ts";
import type { KvCache } from "./kv-cache.ts";
import type { LayerStack } from "./layer-stack.ts";
import type { DecodeRow, PrefillChunk, StepPlan } from "./model-runner.ts";
import type { HeadRow, LogitsCopies, OutputHead } from "./output-head.ts";
import { StepPass } from "./step-pass.ts";
import type { ReadbackEntry, StepReadback } from "./step-readback.ts";
import type { TokenTables } from "./token-tables.ts";

/** What the step's results belong to, in the order of the log: prefill rows that sample, then decode rows step by step. */
export interface SampledRows {
  readonly slots: readonly number[];
  /** Row of the logits staging, or undefined. */
  readonly logitsRows: readonly (number | undefined)[];
  readonly logits: number;
}

export interface StepEncoderParts {
  readonly gpu: Gpu;
  readonly activations: Activations;
  readonly cache: KvCache;
  readonly tokens: TokenTables;
  readonly prefill: { readonly stack: LayerStack; readonly head: OutputHead };
  readonly decode: { readonly stack: LayerStack; readonly head: OutputHead };
  readonly readback: StepReadback;
}

export class StepEncoder {
  readonly #parts: StepEncoderParts;

  constructor(parts: StepEncoderParts) {
    this.#parts = parts;
  }

  /** Whether the step's time on the GPU is measured. */
  static timed(sampled: SampledRows): boolean {
    return sampled.logits === 0;
  }

  /** Encodes and submits. */
  submit(plan: StepPlan, sampled: SampledRows, entry: ReadbackEntry): void {
    const { prefill, decode, decodeSteps = 1 } = plan;
    const { gpu, cache, readback } = this.#parts;
    for (const { slot, pageTable } of prefill) cache.setPages(slot, pageTable);
    for (const { slot, pageTable } of decode) cache.setPages(slot, pageTable);
    const timed = StepEncoder.timed(sampled);
    const step = new StepPass(gpu.device, timed ? entry : undefined);
    const prefilled = sampled.slots.length - decode.length * decodeSteps;
    // Prefill comes last: its rows of the residual stream stay for scoring.
    if (decode.length > 0) this.#encodeDecode(step, decode, decodeSteps, prefilled, sampled, entry);
    if (prefill.length > 0) this.#encodePrefill(step, prefill, sampled, entry);
    step.end();
    readback.encodeCopies(step.encoder, entry, sampled.slots.length, cache.kernels.status, timed);
    gpu.device.queue.submit([step.encoder.finish()]);
  }

  #encodeDecode(
    step: StepPass,
    rows: readonly DecodeRow[],
    steps: number,
    log: number,
    sampled: SampledRows,
    entry: ReadbackEntry,
  ): void {
    const { cache, decode, tokens } = this.#parts;
    tokens.uploadDecode(rows);
    decode.head.prepare(rows.map(({ sample, position }, row): HeadRow => ({ row, sample, position: position + 1 })));
    const copies = this.#logitsCopies(sampled, log, rows.length, entry);
    tokens.load.encode(step.pass, rows.length);
    const plans = cache.kernels.prepareDecodeSteps(rows, steps);
    for (const [index, { attend, seal }] of plans.entries()) {
      const { pass } = step;
      decode.stack.encode(pass, rows.length, (layer) => layer.encodeDecode(pass, attend));
      if (seal.blocks > 0) for (const layer of cache.layers) layer.encodeSeal(pass, seal);
      decode.head.encode(step, rows.length, log + index * rows.length, copies);
    }
  }

  #encodePrefill(step: StepPass, chunks: readonly PrefillChunk[], sampled: SampledRows, entry: ReadbackEntry): void {
    const { gpu, cache, activations, prefill, tokens: tables } = this.#parts;
    const headRows: HeadRow[] = [];
    let rows = 0;
    for (const { tokens, position, sample } of chunks) {
      gpu.device.queue.writeBuffer(activations.prefillTokens, rows * 4, tokens as Uint32Array<ArrayBuffer>);
      rows += tokens.length;
      if (sample !== undefined) headRows.push({ row: rows - 1, sample, position: position + tokens.length });
    }
    const plan = cache.kernels.preparePrefill(
      chunks.map(({ slot, position, tokens }) => ({ slot, position, tokens: tokens.length })),
    );
    const { pass } = step;
    const attend = (layer: KvLayer) => layer.encodePrefill(pass, plan);
    prefill.stack.encode(pass, rows, attend);
    if (headRows.length === 0) return;
    tables.uploadPrefill(sampled.slots.slice(0, headRows.length));
    prefill.head.prepare(headRows);
    prefill.head.encode(step, headRows.length, 0, this.#logitsCopies(sampled, 0, headRows.length, entry));
  }

  /** @param first @param count the phase's rows of `sampled`. */
  #logitsCopies(
    { logitsRows, logits }: SampledRows,
    first: number,
    count: number,
    entry: ReadbackEntry,
  ): LogitsCopies | undefined {
    const rows = logitsRows.slice(first, first + count);
    if (rows.every((row) => row === undefined)) return undefined;
    const { readback } = this.#parts;
    return {
      staging: readback.logits(entry, logits),
      offset: (row) => {
        const target = rows[row];
        return target === undefined ? undefined : target * readback.logitsRowBytes;
      },
    };
  }
}

/** The rows that a plan samples. */
export function sampledRows({ prefill, decode, decodeSteps = 1 }: StepPlan): SampledRows {
  const slots: number[] = [];
  const logitsRows: (number | undefined)[] = [];
  let logits = 0;
  const note = (slot: number, returnLogits: boolean | undefined) => {
    slots.push(slot);
    logitsRows.push(returnLogits === true ? logits++ : undefined);
  };
  for (const { slot, sample, returnLogits } of prefill) if (sample !== undefined) note(slot, returnLogits);
  for (let step = 0; step < decodeSteps; step++) for (const { slot, returnLogits } of decode) note(slot, returnLogits);
  return { slots, logitsRows, logits };
}
