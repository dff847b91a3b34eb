import { mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, it } from "vitest";
import { main } from "../main.ts";
import type { Output } from "../output.ts";

it("serves metrics on a free port that it prints, unless a port is given", async () => {
  const folder = mkdtempSync(join(tmpdir(), "kivimesh-cachestore-"));
  let announced = (_text: string): void => {};
  const notice = new Promise<string>((resolve) => {
    announced = resolve;
  });
  const output: Output = { write() {}, line() {}, json() {}, notice: (text) => announced(text) };
  const options = ["--port", "0", "--data-directory", folder, "--log-level", "error"];
  const ended = main(["cachestore", ...options], output);
  const url = /metrics (http:\S+)/.exec(await notice)?.[1] ?? "";
  try {
    expect(await (await fetch(url)).text()).toContain("kivimesh_cachestore_");
    expect((await fetch(url.replace("/metrics", "/readyz"))).status).toBe(200);
  } finally {
    process.emit("SIGTERM");
  }
  expect(await ended).toBe(0);
});
