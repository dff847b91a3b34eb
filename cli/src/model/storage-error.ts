/** Failures of this machine's file system while a model is fetched: nothing is wrong with the model or its source. */
import { SetupError } from "../setup/setup-error.ts";

/** errno names (errno(3)) of writing and reading files; sockets fail with others. */
const STORAGE_CODES: ReadonlySet<string> = new Set([
  ...["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG"],
  ...["EMFILE", "ENFILE", "ENAMETOOLONG", "ENOTDIR", "EISDIR", "ENOENT"],
]);

/** What to tell of a file system's failure at `path`; undefined where the error is of another kind. */
export function storageError(error: unknown, path: string): SetupError | undefined {
  const { code, message } = error as NodeJS.ErrnoException;
  if (code === undefined || !STORAGE_CODES.has(code)) return undefined;
  const hint = code === "ENOSPC" || code === "EDQUOT" ? "; free some space and run the same command again" : "";
  return new SetupError(`cannot write ${path}: ${message}${hint}`, { cause: error });
}
