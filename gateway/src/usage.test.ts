import { create } from "@bufbuild/protobuf";
import { UsageSchema } from "@kivimesh/proto";
import fc from "fast-check";
import { expect, it } from "vitest";
import { clientUsage } from "./usage.ts";

const facts = { promptTokens: 100, completionTokens: 7, worker: "w", kvFormat: "kivi2r" };

it("sums to the prompt whatever the worker counted, and takes what exceeds it from the computed first", () => {
  const part = fc.nat(200);
  fc.assert(
    fc.property(part, part, part, part, (gpu, peer, cachestore, computed) => {
      const reported = create(UsageSchema, { kivimesh: { promptTokensBySource: { gpu, peer, cachestore, computed } } });
      const usage = clientUsage(facts, reported);
      const source = usage.kivimesh?.promptTokensBySource;
      const sum = (source?.gpu ?? 0) + (source?.peer ?? 0) + (source?.cachestore ?? 0) + (source?.computed ?? 0);
      expect(sum).toBe(100);
      expect(usage.cachedTokens).toBe(100 - (source?.computed ?? 0));
      if (gpu + peer + cachestore <= 100) expect(usage.cachedTokens).toBe(gpu + peer + cachestore);
    }),
  );
});

it("keeps the gateway's counts and the worker's bytes", () => {
  const reported = create(UsageSchema, { promptTokens: 1, kivimesh: { kvFormat: "f16", fetchedBytes: 5n } });
  expect(clientUsage(facts, reported)).toMatchObject({
    promptTokens: 100,
    completionTokens: 7,
    kivimesh: { worker: "w", kvFormat: "f16", fetchedBytes: 5n, promptTokensBySource: { computed: 100 } },
  });
  expect(clientUsage(facts, undefined).kivimesh?.kvFormat).toBe("kivi2r");
});
