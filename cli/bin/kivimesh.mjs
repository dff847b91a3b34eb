#!/usr/bin/env node
/** The `kivimesh` command, straight from a clone: builds what changed, then runs it. */
import { bootstrap } from "../../scripts/setup/bootstrap.mjs";
import { fail } from "../../scripts/setup/progress.mjs";

try {
  // KIVIMESH_SKIP_BUILD=1 runs what was built last, whatever the sources say.
  if (process.env.KIVIMESH_SKIP_BUILD !== "1") await bootstrap({ dependencies: "present" });
} catch (error) {
  fail(error);
}
const { main } = await import("../dist/index.js");
process.exit(await main(process.argv.slice(2)));
