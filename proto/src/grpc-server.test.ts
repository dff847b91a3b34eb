import { createRequire } from "node:module";
import { fromBinary } from "@bufbuild/protobuf";
import { FileDescriptorProtoSchema } from "@bufbuild/protobuf/wkt";
import { createChannel, createClient as createPlainClient } from "nice-grpc";
import { HealthDefinition } from "nice-grpc-server-health";
import { ServerReflectionService } from "nice-grpc-server-reflection";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { ClusterError } from "./errors.ts";
import { Cachestore } from "./gen/kivimesh/v1/cachestore_pb.ts";
import { createClient, type RpcClient } from "./grpc-client.ts";
import { type GrpcServer, implementService, serveGrpc } from "./grpc-server.ts";

const { ServerReflectionRequest } = createRequire(import.meta.url)(
  "nice-grpc-server-reflection/lib/proto/grpc/reflection/v1/reflection_pb.js",
) as typeof import("nice-grpc-server-reflection/lib/proto/grpc/reflection/v1/reflection_pb.js");

const large = new Uint8Array(5 * 1024 * 1024).fill(7);
const internalErrors: string[] = [];
const endedStreams: string[] = [];
let release: (() => void) | undefined;

const cachestore = implementService(Cachestore, {
  async lookup(request, context) {
    if (request.leaseMs === 1) {
      await new Promise((resolve) => context.signal.addEventListener("abort", resolve));
      endedStreams.push("lookup");
    }
    return { held: request.blockIds.length, leaseId: "lease" };
  },
  async *fetch(request, context) {
    try {
      for (const id of request.blockIds) {
        yield { part: { case: "chunk" as const, value: id } };
      }
      if (request.blockIds.length === 0) {
        await new Promise((_, reject) => context.signal.addEventListener("abort", reject));
      }
    } finally {
      endedStreams.push("fetch");
    }
  },
  async store(requests) {
    let bytes = 0;
    for await (const { part } of requests) {
      bytes += part.case === "chunk" ? part.value.length : 0;
    }
    return { stored: bytes === 3 * large.length };
  },
  async release(request) {
    if (request.leaseId === "slow") {
      await new Promise<void>((resolve) => {
        release = resolve;
      });
      return {};
    }
    throw new ClusterError("QUEUE_FULL", "too many wait", { retryAfterMs: 700, parameter: "lease_id" });
  },
  async pin() {
    throw new Error("a defect with a secret");
  },
  async stats() {
    return { blocks: 1n };
  },
  async *events() {
    yield { number: 1n, event: { case: "cleared" as const, value: {} } };
    throw new ClusterError("STORE_FULL", "full");
  },
});

let server: GrpcServer;
let client: RpcClient<typeof Cachestore>;

beforeAll(async () => {
  const onInternalError = (error: unknown, method: string) => internalErrors.push(`${method}: ${error}`);
  server = await serveGrpc({ port: 0, services: [cachestore], onInternalError });
  client = createClient(Cachestore, server.address);
});

afterAll(async () => {
  client.close();
  await server.shutdown(100);
});

describe("calls", () => {
  it("carry messages over 4 MiB in both directions and in every call style", async () => {
    expect((await client.lookup({ blockIds: [large, large] })).held).toBe(2);
    const received = [];
    for await (const { part } of client.fetch({ blockIds: [large, new Uint8Array(3)] })) {
      received.push(part.value);
    }
    expect(Buffer.compare(received[0] as Uint8Array, large)).toBe(0);
    expect(received.length).toBe(2);
    const parts = async function* () {
      for (let index = 0; index < 3; index++) {
        yield { part: { case: "chunk" as const, value: large } };
      }
    };
    expect((await client.store(parts())).stored).toBe(true);
    expect((await client.stats({})).blocks).toBe(1n);
  });

  it("bring a ClusterError over whole", async () => {
    await expect(client.release({ leaseId: "x" })).rejects.toMatchObject({
      name: "ClusterError",
      code: "QUEUE_FULL",
      message: "too many wait",
      retryAfterMs: 700,
      parameter: "lease_id",
    });
    const read = async () => {
      for await (const event of client.events({})) {
        expect(event.event.case).toBe("cleared");
      }
    };
    await expect(read()).rejects.toMatchObject({ code: "STORE_FULL" });
  });

  it("hide defects, and tell the server's owner", async () => {
    await expect(client.pin({})).rejects.toMatchObject({ code: "INTERNAL", message: "internal error" });
    expect(internalErrors).toEqual(["/kivimesh.v1.Cachestore/Pin: Error: a defect with a secret"]);
  });

  it("end at their deadline, on both sides", async () => {
    endedStreams.length = 0;
    const before = performance.now();
    await expect(client.lookup({ leaseMs: 1 }, { deadline: 200 })).rejects.toMatchObject({ code: "DEADLINE_EXCEEDED" });
    expect(performance.now() - before).toBeLessThan(2_000);
    await expect.poll(() => endedStreams).toEqual(["lookup"]);
    const impatient = createClient(Cachestore, server.address, { defaultDeadlineMs: 200 });
    await expect(impatient.lookup({ leaseMs: 1 })).rejects.toMatchObject({ code: "DEADLINE_EXCEEDED" });
    await expect.poll(() => endedStreams).toEqual(["lookup", "lookup"]);
    impatient.close();
  });

  it("end when the caller aborts, on both sides", async () => {
    endedStreams.length = 0;
    const abort = new AbortController();
    setTimeout(() => abort.abort(), 100);
    const read = async () => {
      for await (const _ of client.fetch({ blockIds: [] }, { signal: abort.signal })) {
        expect.unreachable();
      }
    };
    await expect(read()).rejects.toMatchObject({ code: "CANCELLED" });
    await expect.poll(() => endedStreams).toEqual(["fetch"]);
  });

  it("end on the server when the reader leaves its loop", async () => {
    endedStreams.length = 0;
    for await (const _ of client.fetch({ blockIds: Array.from({ length: 12 }, () => large) })) {
      break;
    }
    await expect.poll(() => endedStreams).toEqual(["fetch"]);
  });

  it("refuse a message over the limit", async () => {
    const blockIds = Array.from({ length: 13 }, () => large);
    await expect(client.lookup({ blockIds })).rejects.toMatchObject({ code: "REQUEST_TOO_LARGE" });
  });

  it("fail as UNAVAILABLE without a server", async () => {
    const nobody = createClient(Cachestore, "127.0.0.1:1");
    await expect(nobody.stats({}, { deadline: 5_000 })).rejects.toMatchObject({ code: "UNAVAILABLE" });
    nobody.close();
  });
});

describe("health", () => {
  it("answers by name, and follows setServing", async () => {
    const channel = createChannel(server.address);
    const health = createPlainClient(HealthDefinition, channel);
    const statusOf = async (service: string) => (await health.check({ service })).status;
    expect([await statusOf(""), await statusOf("readiness"), await statusOf("liveness")]).toEqual([2, 2, 1]);
    server.setServing(true);
    expect([await statusOf(""), await statusOf("readiness"), await statusOf("liveness")]).toEqual([1, 1, 1]);
    server.setServing(false);
    expect(await statusOf("readiness")).toBe(2);
    await expect(statusOf("nothing")).rejects.toThrow(/NOT_FOUND/);
    channel.close();
  });
});

describe("reflection", () => {
  const info = ServerReflectionService.serverReflectionInfo;
  it.each(["v1", "v1alpha"])("%s describes the services", async (version) => {
    const path = info.path.replace(".v1.", `.${version}.`);
    const channel = createChannel(server.address);
    const reflection = createPlainClient({ serverReflectionInfo: { ...info, path } }, channel);
    const questions = [
      new ServerReflectionRequest().setListServices(""),
      new ServerReflectionRequest().setFileContainingSymbol("kivimesh.v1.Cachestore"),
      new ServerReflectionRequest().setFileByFilename("kivimesh/v1/kv_block.proto"),
      new ServerReflectionRequest().setFileContainingSymbol("grpc.health.v1.Health"),
    ];
    const ask = async function* () {
      yield* questions;
    };
    const answers = [];
    for await (const answer of reflection.serverReflectionInfo(ask())) {
      answers.push(answer);
    }
    expect(
      answers[0]
        ?.getListServicesResponse()
        ?.getServiceList()
        .map((each) => each.getName()),
    ).toEqual(["kivimesh.v1.Cachestore", "grpc.health.v1.Health"]);
    const files = answers.slice(1).map((answer) => {
      const bytes = answer.getFileDescriptorResponse()?.getFileDescriptorProtoList_asU8()[0];
      return fromBinary(FileDescriptorProtoSchema, bytes!);
    });
    expect(files.map((file) => file.name)).toEqual([
      "kivimesh/v1/cachestore.proto",
      "kivimesh/v1/kv_block.proto",
      "grpc/health/v1/health.proto",
    ]);
    expect(files[2]?.service[0]?.method.map((method) => method.name)).toEqual(["Check", "Watch"]);
    expect(files[0]?.dependency).toEqual(["kivimesh/v1/kv_block.proto"]);
    channel.close();
  });
});

describe("listening and leaving", () => {
  it("refuses the open network in the clear", async () => {
    for (const host of ["0.0.0.0", "::", "10.1.2.3"]) {
      await expect(serveGrpc({ host, port: 0, services: [] })).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
    }
    const allowed = await serveGrpc({ host: "0.0.0.0", port: 0, services: [cachestore], allowInsecure: true });
    await allowed.shutdown(100);
  });

  it("reports a port that is taken", async () => {
    await expect(serveGrpc({ port: server.port, services: [] })).rejects.toThrow(/EADDRINUSE|address/);
  });

  it("waits for running calls, then cuts them", async () => {
    const leaving = await serveGrpc({ port: 0, services: [cachestore] });
    const caller = createClient(Cachestore, leaving.address);
    const patient = caller.release({ leaseId: "slow" });
    await expect.poll(() => release).toBeDefined();
    const closing = leaving.shutdown(5_000);
    setTimeout(() => release?.(), 200);
    await expect(patient).resolves.toBeDefined();
    await closing;
    caller.close();

    const cut = await serveGrpc({ port: 0, services: [cachestore] });
    const other = createClient(Cachestore, cut.address);
    const doomed = expect(other.lookup({ leaseMs: 1 })).rejects.toMatchObject({ code: /CANCELLED|UNAVAILABLE/ });
    await other.stats({});
    const before = performance.now();
    await cut.shutdown(200);
    expect(performance.now() - before).toBeLessThan(2_000);
    await doomed;
    other.close();
  });
});
