/**
 * `npm start`: sets up what lacks, then runs the embedded cluster with a first prompt. Options after `--` are those of
 * `kivimesh up`.
 */
import { bootstrap } from "./setup/bootstrap.mjs";
import { fail } from "./setup/progress.mjs";

const FIRST_PROMPT = "Explain step by step how a rainbow forms, and why its colours always appear in the same order.";

try {
  await bootstrap();
  const { setUpForServing } = await import("../cli/dist/setup/set-up.js");
  const options = process.argv.slice(2);
  const asked =
    process.env.KIVIMESH_PROMPT !== undefined ||
    options.some((option) => option === "--prompt" || option.startsWith("--prompt="));
  await setUpForServing(options);
  const { main } = await import("../cli/dist/index.js");
  process.exit(await main(["up", ...(asked ? [] : ["--prompt", FIRST_PROMPT]), ...options]));
} catch (error) {
  fail(error);
}
