/** Turns the scheduler's step into the model runner's. */
import type { DecodeRow, PrefillChunk, StepPlan } from "./model/index.ts";
import type { PlannedStep } from "./scheduler.ts";
import type { Sequence } from "./sequence.ts";
import type { SequenceTable } from "./sequence-table.ts";

/** A sequence's part in a step: afterwards its first `end` tokens are computed. */
export interface StepPart {
  readonly sequence: Sequence;
  readonly slot: number;
  readonly start: number;
  readonly end: number;
  /** Tokens that the step samples for the sequence. */
  readonly samples: number;
  readonly phase: "prefill" | "decode";
}

/** A planned step with pages reserved: what the runner runs, and whose rows these are. */
export interface BuiltStep {
  readonly plan: StepPlan;
  /** In the order of the plan: prefill chunks, then decode rows. */
  readonly parts: readonly StepPart[];
}

/** Carries out preemption and admission, reserves the pages of every row, and notes in the sequences what is under way. */
export function buildStep(planned: PlannedStep, table: SequenceTable): BuiltStep {
  const find = (id: string): Sequence => table.find(id)!;
  for (const id of planned.preempt) table.preempt(find(id));
  for (const id of planned.admit) table.admit(find(id));
  const parts: StepPart[] = [];
  const prefill: PrefillChunk[] = [];
  const decode: DecodeRow[] = [];
  const { decodeSteps } = planned;
  for (const { id, start, end } of planned.prefill) {
    const sequence = find(id);
    // A resumed sequence has tokens behind its prefill: they are replayed as decode rows before it samples.
    const samples = end === sequence.tokens.length ? 1 : 0;
    table.reserve(sequence, end);
    parts.push({ sequence, slot: sequence.slot, start, end, samples, phase: "prefill" });
    prefill.push(prefillChunk(sequence, start, end, samples === 1));
    begin(sequence, end, samples);
  }
  for (const id of planned.decode) {
    const sequence = find(id);
    const start = sequence.planned;
    const end = start + decodeSteps;
    const samples = sequence.replays ? 0 : decodeSteps;
    table.reserve(sequence, end);
    parts.push({ sequence, slot: sequence.slot, start, end, samples, phase: "decode" });
    decode.push(decodeRow(sequence, start));
    begin(sequence, end, samples);
  }
  return { plan: { prefill, decode, decodeSteps }, parts };
}

function begin(sequence: Sequence, end: number, samples: number): void {
  sequence.planned = end;
  sequence.unread += samples;
}

function prefillChunk(sequence: Sequence, start: number, end: number, samples: boolean): PrefillChunk {
  const chunk = {
    slot: sequence.slot,
    tokens: Uint32Array.from(sequence.tokens.slice(start, end)),
    position: start,
    pageTable: sequence.pages,
  };
  if (!samples) return chunk;
  return { ...chunk, sample: sequence.request.sampling, returnLogits: sequence.wantsLogits };
}

function decodeRow(sequence: Sequence, position: number): DecodeRow {
  const { slot, tokens, pages: pageTable } = sequence;
  return {
    slot,
    // A token that no result has brought yet is on the GPU.
    token: position < tokens.length ? tokens[position]! : undefined,
    position,
    pageTable,
    sample: sequence.request.sampling,
    returnLogits: !sequence.replays && sequence.wantsLogits,
  };
}
