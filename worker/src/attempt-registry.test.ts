import { expect, it } from "vitest";
import { AttemptRegistry } from "./attempt-registry.ts";

it("runs each epoch once and only upwards", () => {
  const registry = new AttemptRegistry();
  expect(registry.submit("r", 1)).toBe("run");
  expect(registry.submit("r", 1)).toBe("stale");
  expect(registry.submit("r", 0)).toBe("stale");
  expect(registry.submit("r", 2)).toBe("run");
  expect(registry.submit("other", 0)).toBe("run");
});

it("applies an abort that came before its job, but not to later epochs", () => {
  const registry = new AttemptRegistry();
  registry.abort("r", 1);
  expect(registry.submit("r", 1)).toBe("aborted");
  expect(registry.submit("r", 2)).toBe("run");
});

it("forgets the oldest request over its limit", () => {
  const registry = new AttemptRegistry(2);
  for (const id of ["a", "b", "c"]) registry.abort(id, 0);
  expect(registry.size).toBe(2);
  expect(registry.submit("a", 0)).toBe("run");
  expect(registry.submit("c", 0)).toBe("aborted");
});
