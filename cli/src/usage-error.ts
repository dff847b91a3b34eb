/** Options that do not go together; exit code 2. */
export class UsageError extends Error {
  override readonly name = "UsageError";
}
