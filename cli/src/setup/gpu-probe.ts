/**
 * Opens the GPU once and prints what it is, as JSON. A process of its own: a broken driver may crash, and one that was
 * missing at load time is not found again by the same process after it was installed.
 */
import { openGpu } from "@kivimesh/kernels";

const gpu = await openGpu();
process.stdout.write(`${JSON.stringify({ name: gpu.name, profile: gpu.profile })}\n`);
process.exit(0);
