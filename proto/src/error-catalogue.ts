import { Status } from "nice-grpc-common";

/** How one operating error appears at every surface. */
export interface ErrorKind {
  readonly grpcStatus: Status;
  readonly httpStatus: number;
  /** `error.type` of the OpenAI error body. */
  readonly openaiType: string;
  readonly description: string;
}

const invalid = "invalid_request_error";
const overloaded = "overloaded_error";
const unavailable = "service_unavailable_error";
const internal = "server_error";

/** Every operating error of the cluster: one code, one gRPC status, one HTTP status, one OpenAI type. */
export const errorCatalogue = {
  INVALID_ARGUMENT: kind(Status.INVALID_ARGUMENT, 400, invalid, "A field of the request is missing or not allowed."),
  CONTEXT_LENGTH_EXCEEDED: kind(
    Status.INVALID_ARGUMENT,
    400,
    invalid,
    "The prompt and max_tokens do not fit the model.",
  ),
  REQUEST_TOO_LARGE: kind(Status.INVALID_ARGUMENT, 413, invalid, "The request is larger than the limit."),
  UNAUTHENTICATED: kind(Status.UNAUTHENTICATED, 401, "authentication_error", "No valid API key."),
  MODEL_NOT_FOUND: kind(Status.NOT_FOUND, 404, invalid, "No such model is served."),
  NOT_FOUND: kind(Status.NOT_FOUND, 404, invalid, "No such thing here."),
  KV_BLOCK_NOT_FOUND: kind(Status.NOT_FOUND, 404, invalid, "The KV block is not held here."),
  QUEUE_FULL: kind(Status.RESOURCE_EXHAUSTED, 429, overloaded, "Too many requests wait already; try again later."),
  PAGE_POOL_EXHAUSTED: kind(Status.RESOURCE_EXHAUSTED, 429, overloaded, "No free KV pages on the worker."),
  STORE_FULL: kind(Status.RESOURCE_EXHAUSTED, 429, overloaded, "The cachestore holds only leased and pinned blocks."),
  NO_WORKER: kind(Status.UNAVAILABLE, 503, unavailable, "No worker can take the request."),
  WORKER_LOST: kind(Status.UNAVAILABLE, 503, unavailable, "The worker was lost and no other could take over."),
  WORKER_DRAINING: kind(Status.UNAVAILABLE, 503, unavailable, "The worker is shutting down."),
  GATEWAY_DRAINING: kind(Status.UNAVAILABLE, 503, unavailable, "The gateway is shutting down."),
  QUEUE_UNAVAILABLE: kind(Status.UNAVAILABLE, 503, unavailable, "The job queue cannot be reached."),
  UNAVAILABLE: kind(Status.UNAVAILABLE, 503, unavailable, "The service cannot be reached."),
  DEADLINE_EXCEEDED: kind(Status.DEADLINE_EXCEEDED, 504, "timeout_error", "The deadline passed."),
  CANCELLED: kind(Status.CANCELLED, 499, "cancelled_error", "The caller ended the request."),
  KV_BLOCK_CORRUPT: kind(Status.DATA_LOSS, 500, internal, "A KV block's bytes do not match its header."),
  KV_NOT_FINITE: kind(Status.INTERNAL, 500, internal, "The model produced NaN or infinity in the KV cache."),
  MODEL_MISMATCH: kind(
    Status.FAILED_PRECONDITION,
    409,
    invalid,
    "The block or job belongs to another model or format.",
  ),
  MODEL_FILE_INVALID: kind(Status.FAILED_PRECONDITION, 500, internal, "The model file is damaged or incomplete."),
  MODEL_UNSUPPORTED: kind(Status.FAILED_PRECONDITION, 500, internal, "The model's architecture is not supported."),
  GPU_UNAVAILABLE: kind(Status.FAILED_PRECONDITION, 500, internal, "No usable GPU adapter."),
  DEVICE_LOST: kind(Status.UNAVAILABLE, 503, unavailable, "The GPU device was lost."),
  INTERNAL: kind(Status.INTERNAL, 500, internal, "An unexpected failure."),
} as const satisfies Record<string, ErrorKind>;

/** A code of the catalogue; stable for clients, sent as `code` in error bodies and in trailing metadata. */
export type ErrorCode = keyof typeof errorCatalogue;

/** Whether `text` is a code of the catalogue. */
export function isErrorCode(text: string): text is ErrorCode {
  return Object.hasOwn(errorCatalogue, text);
}

/** The code that stands for a bare gRPC status, where the other side named none. */
export function errorCodeOf(status: Status): ErrorCode {
  return codeOfStatus[status] ?? "INTERNAL";
}

const codeOfStatus: Partial<Record<Status, ErrorCode>> = {
  [Status.CANCELLED]: "CANCELLED",
  [Status.ABORTED]: "CANCELLED",
  [Status.INVALID_ARGUMENT]: "INVALID_ARGUMENT",
  [Status.OUT_OF_RANGE]: "INVALID_ARGUMENT",
  [Status.DEADLINE_EXCEEDED]: "DEADLINE_EXCEEDED",
  [Status.NOT_FOUND]: "NOT_FOUND",
  [Status.UNAUTHENTICATED]: "UNAUTHENTICATED",
  [Status.PERMISSION_DENIED]: "UNAUTHENTICATED",
  // Ours name their code; a bare one is grpc-js's answer to a message over the limit.
  [Status.RESOURCE_EXHAUSTED]: "REQUEST_TOO_LARGE",
  [Status.FAILED_PRECONDITION]: "MODEL_MISMATCH",
  [Status.DATA_LOSS]: "KV_BLOCK_CORRUPT",
  [Status.UNAVAILABLE]: "UNAVAILABLE",
};

function kind(grpcStatus: Status, httpStatus: number, openaiType: string, description: string): ErrorKind {
  return { grpcStatus, httpStatus, openaiType, description };
}
