/** This device lacks what the case needs (matrices, memory): its row says so, and nothing failed. Thrown by `prepare`. */
export class CaseUnsupportedError extends Error {
  override readonly name = "CaseUnsupportedError";
}
