import { expect, it } from "vitest";
import type { BlockFetch, BlockSink } from "./block-transfer.ts";
import { fetchRateLifeSeconds } from "./fetch-choice.ts";
import { greedySampling } from "./generation.ts";
import { dummyModel } from "./model/dummy-model.ts";
import { kvGeometry } from "./model-runner/kv-geometry.ts";
import { PagePool } from "./page-pool.ts";
import { PrefixIntake } from "./prefix-intake.ts";
import { Sequence } from "./sequence.ts";

const kv = kvGeometry(dummyModel("tiny-llama").config, "kivi2r", 32, 32);
const prefillTokensPerSecond = 1_000;

/** An intake whose store delivers one block in `seconds`, over a clock that the test moves. */
function intakeOverClock() {
  const clock = { now: 5_000 };
  const store = { fetches: 0, seconds: 1_000 };
  const transfer = {
    fetch({ fetchId, ids }: BlockFetch, sink: BlockSink) {
      store.fetches += 1;
      sink.block(fetchId, ids[0]!, new Uint8Array(kv.blockBytes));
      sink.ended(fetchId, { bytes: kv.blockBytes, seconds: store.seconds });
    },
    sealed() {},
  };
  const pool = new PagePool(64);
  const runner = { writeBlock() {} };
  const intake = new PrefixIntake({ pool, runner, kv, transfer, wake() {}, now: () => clock.now });
  let arrival = 0;
  /** Whether the prefix of another prompt is fetched. */
  const fetches = (): boolean => {
    const tokens = Uint32Array.from({ length: 100 }, (_, index) => (index * 7 + arrival) % 256);
    const request = {
      ...{ requestId: `r${arrival}`, epoch: 0, tokens, promptTokens: tokens.length, maxTokens: 1 },
      ...{ sampling: greedySampling, stopTokenIds: [], tenantNamespace: new Uint8Array(32) },
      ...{ deadlineUnixMs: 0, returnFirstLogits: false },
    };
    const modelDigest = new Uint8Array(32);
    const sequence = new Sequence({ request, arrival: arrival++, modelDigest, kv, numerics: "invariant" });
    const started = intake.start(sequence, prefillTokensPerSecond);
    intake.settle();
    return started;
  };
  return { clock, store, pool, fetches };
}

it("does not fetch after a slow fetch, until its rate is old; the next one counts alone", () => {
  const { clock, store, pool, fetches } = intakeOverClock();
  expect(fetches()).toBe(true);
  expect(pool.indexed).toBe(1);
  expect(fetches()).toBe(false);
  clock.now += fetchRateLifeSeconds * 1_000 - 1;
  expect(fetches()).toBe(false);
  expect(store.fetches).toBe(1);
  clock.now += 1;
  store.seconds = 0.001;
  expect(fetches()).toBe(true);
  expect(fetches()).toBe(true);
  expect(store.fetches).toBe(3);
  expect(pool.indexed).toBe(3);
});
