/** What becomes of a sequence when it is looked at first: its missing blocks are fetched, or it is ready. */
import type { PagePool } from "./page-pool.ts";
import type { PrefixIntake } from "./prefix-intake.ts";
import type { Sequence } from "./sequence.ts";
import type { SequenceTable } from "./sequence-table.ts";

export interface QueuedExamination {
  readonly table: SequenceTable;
  readonly pool: PagePool;
  readonly intake: PrefixIntake | undefined;
  readonly limits: { readonly maxSequences: number; readonly blockTokens: number };
  readonly prefillTokensPerSecond: number;
}

/** Looks at the waiting sequences, those queued first before the others: few more than can run. */
export function examineQueued(examination: QueuedExamination): void {
  const { table, pool, intake, limits, prefillTokensPerSecond } = examination;
  let examined = 0;
  for (const sequence of table.waiting) {
    if (examined >= limits.maxSequences) return;
    examined += 1;
    if (sequence.state !== "queued") continue;
    const ids = sequence.shareableIds();
    const missing = ids[pool.match(ids).length];
    // Somebody brings or computes the next block already: looking again then saves doing it twice.
    if (missing !== undefined && (intake?.fetching(missing) || computing(examination, missing))) continue;
    if (missing === undefined || !intake?.start(sequence, prefillTokensPerSecond)) sequence.state = "ready";
  }
}

function computing({ table, limits }: QueuedExamination, id: string): boolean {
  return table.running.some((sequence: Sequence) => {
    if (!sequence.prefilling) return false;
    const shareable = sequence.chain.ids(sequence.tokens, sequence.shareableBlocks());
    return shareable.indexOf(id, sequence.computed / limits.blockTokens) >= 0;
  });
}
