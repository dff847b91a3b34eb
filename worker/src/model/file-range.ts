/** Positioned reads of model files. */
import { readSync } from "node:fs";
import { ClusterError } from "@kivimesh/proto";

/** Reads `bytes` at `start`; a short read means that the file changed under us. */
export function readRange(path: string, descriptor: number, tensor: string, start: number, bytes: number): Uint8Array {
  const buffer = new Uint8Array(bytes);
  let done = 0;
  while (done < bytes) {
    const count = readSync(descriptor, buffer, done, Math.min(bytes - done, 1 << 30), start + done);
    if (count === 0) {
      throw new ClusterError(
        "MODEL_FILE_INVALID",
        `${path}: tensor "${tensor}" ends early: the file was cut while in use`,
      );
    }
    done += count;
  }
  return buffer;
}
