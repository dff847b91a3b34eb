/** Set-up that may not or cannot act. The message says what to run instead. */
export class SetupError extends Error {
  override readonly name = "SetupError";
}
