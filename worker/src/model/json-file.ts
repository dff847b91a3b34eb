/** JSON files of model folders. */
import { readFileSync } from "node:fs";
import { ClusterError } from "@kivimesh/proto";

/** Reads a JSON file of a model folder. @throws ClusterError MODEL_FILE_INVALID where it is missing or no JSON. */
export function readJson(path: string): unknown {
  try {
    return JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    const missing = error instanceof Error && "code" in error && error.code === "ENOENT";
    throw new ClusterError("MODEL_FILE_INVALID", `${path}: ${missing ? "is missing" : "is not JSON"}`, {
      cause: error,
    });
  }
}
