/**
 * `npm start`: sets up what lacks, then runs the embedded cluster with a first prompt. Options after `--` are those of
 * `kivimesh up`.
 */
import { bootstrap } from "./setup/bootstrap.mjs";
import { fail } from "./setup/progress.mjs";

/** Long enough that blocks are sealed, so that the report shows what they save. */
const FIRST_PROMPT = `Rainbows appear when the sun shines from behind you onto rain that is still falling in front of you. \
Sunlight looks white, but it is a mixture of all colors. When a ray of light enters a drop of water, it bends, and each \
color bends by a slightly different angle. The light is then reflected at the back of the drop and bends once more as \
it leaves. Because red light leaves at a steeper angle than violet light, red is always at the outer edge of the bow \
and violet at the inner edge. You can make a small rainbow yourself with a garden hose on a sunny morning.

Explain in a few sentences how a rainbow forms.`;

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
