import { ClientError, Metadata, ServerError, Status } from "nice-grpc-common";
import { describe, expect, it } from "vitest";
import { type ErrorCode, errorCatalogue, errorCodeOf, isErrorCode } from "./error-catalogue.ts";
import { ClusterError, errorTrailer, fromRpcError, toServerError } from "./errors.ts";

const codes = Object.keys(errorCatalogue) as ErrorCode[];

describe("the catalogue", () => {
  it.each(codes)("%s has a failing status at every surface", (code) => {
    const kind = errorCatalogue[code];
    expect(kind.grpcStatus).not.toBe(Status.OK);
    expect(Status[kind.grpcStatus]).toBeTypeOf("string");
    expect(kind.httpStatus).toBeGreaterThanOrEqual(400);
    expect(kind.httpStatus).toBeLessThan(600);
    expect(kind.openaiType).toMatch(/^[a-z_]+_error$/);
    expect(kind.description).toMatch(/^[A-Z].*\.$/);
  });

  it.each(codes)("%s survives the way over gRPC", (code) => {
    const original = new ClusterError(code, "why", { parameter: "max_tökens", retryAfterMs: 1234.5 });
    const server = toServerError(original);
    expect(server.code).toBe(errorCatalogue[code].grpcStatus);
    const back = fromRpcError(new ClientError("/x/y", server.code, server.details), errorTrailer(original));
    expect(back).toMatchObject({ code, message: "why", parameter: "max_tökens", retryAfterMs: 1235 });
  });

  it("pairs the wait-and-retry statuses as proxies expect", () => {
    for (const code of codes) {
      const { grpcStatus, httpStatus } = errorCatalogue[code];
      expect(httpStatus === 429, code).toBe(grpcStatus === Status.RESOURCE_EXHAUSTED);
      expect(httpStatus === 503, code).toBe(grpcStatus === Status.UNAVAILABLE);
      expect(httpStatus === 504, code).toBe(grpcStatus === Status.DEADLINE_EXCEEDED);
    }
  });

  it("has a code for every gRPC status", () => {
    for (const status of Object.values(Status)) {
      if (typeof status === "number" && status !== Status.OK) {
        expect(isErrorCode(errorCodeOf(status))).toBe(true);
      }
    }
    expect(isErrorCode("toString")).toBe(false);
  });
});

describe("foreign errors", () => {
  it("tell nothing of the inside", () => {
    const server = toServerError(new TypeError("secret of /etc/passwd"));
    expect(server.code).toBe(Status.INTERNAL);
    expect(server.details).toBe("internal error");
  });

  it("keep a gRPC status that was chosen on purpose", () => {
    const chosen = new ServerError(Status.UNIMPLEMENTED, "not here");
    expect(toServerError(chosen)).toBe(chosen);
  });

  it("fall back to the status, and ignore codes that are not ours", () => {
    const lost = new ClientError("/x/y", Status.UNAVAILABLE, "connection refused");
    expect(fromRpcError(lost)).toMatchObject({ code: "UNAVAILABLE", message: "connection refused", cause: lost });
    expect(fromRpcError(lost, Metadata({ "kivimesh-error-code": "NOPE" })).code).toBe("UNAVAILABLE");
    const plain = Metadata({ "kivimesh-error-code": "QUEUE_FULL", "kivimesh-retry-after-ms": "soon" });
    expect(fromRpcError(lost, plain)).toMatchObject({ code: "QUEUE_FULL", retryAfterMs: undefined });
  });

  it("pass through when they are ours already", () => {
    const ours = new ClusterError("NO_WORKER", "none");
    expect(fromRpcError(ours)).toBe(ours);
    expect(fromRpcError(new DOMException("gone", "AbortError")).code).toBe("CANCELLED");
    expect(fromRpcError("text").code).toBe("INTERNAL");
  });
});
