import { ClientError, Metadata, ServerError, Status } from "nice-grpc-common";
import { type ErrorCode, errorCatalogue, errorCodeOf, isErrorCode } from "./error-catalogue.ts";

/** Trailing metadata keys of a failed call. */
const codeKey = "kivimesh-error-code";
const parameterKey = "kivimesh-error-parameter";
const retryKey = "kivimesh-retry-after-ms";

interface ClusterErrorDetails {
  /** Which input is wrong, as the client named it (`max_tokens`). */
  parameter?: string;
  /** When trying again may help, in milliseconds. */
  retryAfterMs?: number;
  cause?: unknown;
}

/**
 * The one class of operating errors. `message` is written for the person who made the request: what was wrong and what
 * is allowed; it never carries prompts or secrets.
 */
export class ClusterError extends Error {
  readonly code: ErrorCode;
  readonly parameter: string | undefined;
  readonly retryAfterMs: number | undefined;

  constructor(code: ErrorCode, message: string, details: ClusterErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = "ClusterError";
    this.code = code;
    this.parameter = details.parameter;
    this.retryAfterMs = details.retryAfterMs;
  }
}

/** What a server answers for `error`. Anything unforeseen becomes INTERNAL with a message that tells nothing of the inside. */
export function toClusterError(error: unknown): ClusterError {
  if (error instanceof ClusterError) {
    return error;
  }
  if (isAbortError(error)) {
    return new ClusterError("CANCELLED", "the call was cancelled", { cause: error });
  }
  return new ClusterError("INTERNAL", "internal error", { cause: error });
}

/** The gRPC status of `error`; its code, parameter and retry delay travel in `errorTrailer`. */
export function toServerError(error: unknown): ServerError {
  if (error instanceof ServerError) {
    return error;
  }
  const known = toClusterError(error);
  return new ServerError(errorCatalogue[known.code].grpcStatus, known.message);
}

/** Trailing metadata that lets `fromRpcError` rebuild the same ClusterError at the caller. */
export function errorTrailer(error: unknown): Metadata {
  const known = toClusterError(error);
  const trailer = Metadata({ [codeKey]: known.code });
  if (known.parameter !== undefined) {
    trailer.set(parameterKey, encodeURIComponent(known.parameter));
  }
  if (known.retryAfterMs !== undefined) {
    trailer.set(retryKey, String(Math.ceil(known.retryAfterMs)));
  }
  return trailer;
}

/**
 * The ClusterError behind a failed call. Clients made by `createClient` throw ClusterErrors already, which pass through.
 * Without a known code in `trailer` (another implementation, a broken connection) the gRPC status decides.
 */
export function fromRpcError(error: unknown, trailer?: Metadata): ClusterError {
  if (!(error instanceof ClientError)) {
    return toClusterError(error);
  }
  const code = trailer?.get(codeKey);
  if (code === undefined || !isErrorCode(code)) {
    return new ClusterError(errorCodeOf(error.code), error.details || Status[error.code], { cause: error });
  }
  const parameter = trailer?.get(parameterKey);
  const retryAfterMs = Number(trailer?.get(retryKey) ?? Number.NaN);
  return new ClusterError(code, error.details, {
    ...(parameter === undefined ? {} : { parameter: decodeURIComponent(parameter) }),
    ...(Number.isFinite(retryAfterMs) ? { retryAfterMs } : {}),
    cause: error,
  });
}

function isAbortError(error: unknown): boolean {
  return error instanceof Error && error.name === "AbortError";
}
