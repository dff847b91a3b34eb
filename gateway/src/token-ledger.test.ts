import fc from "fast-check";
import { describe, expect, it } from "vitest";
import { TokenLedger } from "./token-ledger.ts";

describe("TokenLedger", () => {
  it("delivers each index once and in order, whatever is repeated, late or from another attempt", () => {
    // Tokens of the truth, sent by attempts that each continue where the ledger stands when they begin.
    const truth = Array.from({ length: 60 }, (_, index) => 1000 + index);
    const action = fc.oneof(
      { weight: 1, arbitrary: fc.constant({ kind: "attempt" as const }) },
      {
        weight: 6,
        arbitrary: fc.record({
          kind: fc.constant("send" as const),
          back: fc.nat(3),
          index: fc.nat(20),
          length: fc.nat(4),
          exact: fc.boolean(),
        }),
      },
    );
    fc.assert(
      fc.property(fc.array(action, { maxLength: 60 }), (actions) => {
        const ledger = new TokenLedger();
        const starts = [0];
        const delivered: number[] = [];
        starts.push(0);
        ledger.beginAttempt();
        for (const step of actions) {
          if (step.kind === "attempt") {
            starts[ledger.beginAttempt()] = ledger.tokens.length;
            continue;
          }
          const epoch = Math.max(1, ledger.epoch - step.back);
          const start = starts[epoch] ?? 0;
          const index = step.exact ? Math.max(0, ledger.tokens.length - start) : step.index;
          const before = ledger.tokens.length;
          const entry = ledger.enter(epoch, index, truth.slice(start + index, start + index + step.length));
          if (epoch !== ledger.epoch) expect(entry.kind).toBe("stale");
          else if (start + index > before) expect(entry.kind).toBe("gap");
          else expect(entry.kind).toBe("fresh");
          if (entry.kind === "fresh") delivered.push(...entry.ids);
        }
        expect(delivered).toEqual(truth.slice(0, delivered.length));
        expect(ledger.tokens).toEqual(delivered);
      }),
      { numRuns: 1000 },
    );
  });
});
