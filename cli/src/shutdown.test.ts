import { ClusterError } from "@kivimesh/proto";
import { describe, expect, it } from "vitest";
import type { Output } from "./output.ts";
import { serveUntil } from "./shutdown.ts";

const GRACE_MS = 30_000;

function keptOutput(): Output & { readonly notices: string[] } {
  const notices: string[] = [];
  return { notices, write() {}, line() {}, json() {}, notice: (text) => notices.push(text) };
}

describe("serving until the end", () => {
  const never = new Promise<Error>(() => {});

  it("gives streams their grace after a signal", async () => {
    const graces: number[] = [];
    const server = { failed: never, drain: async (graceMs: number) => void graces.push(graceMs) };
    await serveUntil(AbortSignal.abort(), server, GRACE_MS, keptOutput());
    expect(graces).toEqual([GRACE_MS]);
  });

  it("gives them none after a lost GPU, and throws it", async () => {
    const lost = new ClusterError("DEVICE_LOST", "the GPU is gone");
    const graces: number[] = [];
    const server = { failed: Promise.resolve(lost), drain: async (graceMs: number) => void graces.push(graceMs) };
    const { signal } = new AbortController();
    await expect(serveUntil(signal, server, GRACE_MS, keptOutput())).rejects.toBe(lost);
    expect(graces).toEqual([0]);
  });

  it("does not wait for a drain that hangs on the lost GPU", async () => {
    const lost = new ClusterError("DEVICE_LOST", "the GPU is gone");
    const output = keptOutput();
    const server = { failed: Promise.resolve(lost), drain: () => new Promise<void>(() => {}) };
    const started = Date.now();
    await expect(serveUntil(new AbortController().signal, server, GRACE_MS, output)).rejects.toBe(lost);
    expect(Date.now() - started).toBeLessThan(5_000);
    expect(output.notices).toEqual(["not closed after 2000 ms; ending anyway"]);
  });

  it("throws the failure where draining fails too", async () => {
    const lost = new ClusterError("DEVICE_LOST", "the GPU is gone");
    const output = keptOutput();
    const server = { failed: Promise.resolve(lost), drain: () => Promise.reject(new Error("no socket")) };
    await expect(serveUntil(new AbortController().signal, server, GRACE_MS, output)).rejects.toBe(lost);
    expect(output.notices).toEqual(["while closing: Error: no socket"]);
  });
});
