/** Turns the scheduler's step into the model runner's. */
import type { DecodeRow, PrefillChunk, StepPlan } from "./model/index.ts";
import type { PlannedStep } from "./scheduler.ts";
import type { Sequence } from "./sequence.ts";
import type { SequenceTable } from "./sequence-table.ts";

/** A sequence's part in a step: afterwards its first `end` tokens are computed. */
export interface StepPart {
  readonly sequence: Sequence;
  readonly start: number;
  readonly end: number;
  /** Whether the step samples the sequence's next token. */
  readonly samples: boolean;
  readonly phase: "prefill" | "decode";
}

/** A planned step with pages reserved: what the runner runs, and whose rows these are. */
export interface BuiltStep {
  readonly plan: StepPlan;
  readonly parts: readonly StepPart[];
}

/** Carries out preemption and admission, and reserves the pages of every row. */
export function buildStep(planned: PlannedStep, table: SequenceTable): BuiltStep {
  const byId = new Map(table.all.map((sequence) => [sequence.id, sequence]));
  const find = (id: string): Sequence => byId.get(id)!;
  for (const id of planned.preempt) table.preempt(find(id));
  for (const id of planned.admit) table.admit(find(id));
  const parts: StepPart[] = [];
  const prefill: PrefillChunk[] = [];
  const decode: DecodeRow[] = [];
  for (const { id, start, end } of planned.prefill) {
    const sequence = find(id);
    // A resumed sequence has tokens behind its prefill: they are replayed as decode rows before it samples.
    const samples = end === sequence.tokens.length;
    table.reserve(sequence, end);
    parts.push({ sequence, start, end, samples, phase: "prefill" });
    prefill.push(prefillChunk(sequence, start, end, samples));
  }
  for (const id of planned.decode) {
    const sequence = find(id);
    const start = sequence.computed;
    const samples = start + 1 === sequence.tokens.length;
    table.reserve(sequence, start + 1);
    parts.push({ sequence, start, end: start + 1, samples, phase: "decode" });
    decode.push(decodeRow(sequence, start, samples));
  }
  return { plan: { prefill, decode }, parts };
}

function prefillChunk(sequence: Sequence, start: number, end: number, samples: boolean): PrefillChunk {
  const chunk = {
    slot: sequence.slot,
    tokens: Uint32Array.from(sequence.tokens.slice(start, end)),
    position: start,
    pageTable: sequence.pages,
  };
  if (!samples) return chunk;
  return { ...chunk, sample: sequence.request.sampling, returnLogits: wantsLogits(sequence) };
}

function decodeRow(sequence: Sequence, position: number, samples: boolean): DecodeRow {
  return {
    slot: sequence.slot,
    token: sequence.tokens[position]!,
    position,
    pageTable: sequence.pages,
    sample: sequence.request.sampling,
    returnLogits: samples && wantsLogits(sequence),
  };
}

function wantsLogits(sequence: Sequence): boolean {
  return sequence.request.returnFirstLogits && sequence.generated === 0;
}
