/** The tests start their own Redis servers; this makes sure that the program is there. */
import { spawnSync } from "node:child_process";
import { installPackages } from "./apt.ts";
import { step } from "./step.ts";

export async function ensureRedisServer(): Promise<void> {
  if (spawnSync("redis-server", ["--version"], { stdio: "ignore" }).status === 0) return;
  const request = { packages: ["redis-server"], purpose: "redis-server (for the tests)" };
  await step("installing redis-server", () => installPackages(request));
}
