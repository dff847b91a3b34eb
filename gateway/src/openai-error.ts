import { type ClusterError, errorCatalogue } from "@kivimesh/proto";

/** When trying again may help and the error does not say, in milliseconds. */
const defaultRetryAfterMs = 1_000;

/** An error as OpenAI's clients read it. */
export interface OpenAiError {
  readonly status: number;
  /** Whole seconds, at least 1; undefined where trying again is of no use. */
  readonly retryAfterSeconds: number | undefined;
  readonly body: { error: { message: string; type: string; param: string | null; code: string } };
}

/** Maps a code of the catalogue to status, headers and body. */
export function openAiError(error: ClusterError): OpenAiError {
  const kind = errorCatalogue[error.code];
  const retries = kind.httpStatus === 429 || kind.httpStatus === 503 || error.retryAfterMs !== undefined;
  return {
    status: kind.httpStatus,
    retryAfterSeconds: retries ? Math.max(1, Math.ceil((error.retryAfterMs ?? defaultRetryAfterMs) / 1000)) : undefined,
    body: {
      error: {
        message: error.message,
        type: kind.openaiType,
        param: error.parameter ?? null,
        code: error.code.toLowerCase(),
      },
    },
  };
}
