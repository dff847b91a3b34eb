import { ChannelCredentials } from "@grpc/grpc-js";
import { type ClientMiddleware, createChannel, createClientFactory, type Metadata, type RawClient } from "nice-grpc";
import { type DeadlineOptions, deadlineMiddleware } from "nice-grpc-client-middleware-deadline";
import { fromRpcError } from "./errors.ts";
import { channelOptions, type TlsFiles } from "./grpc-channel.ts";
import { type GrpcServiceDefinition, type ServiceDescriptor, serviceDefinition } from "./service-definition.ts";

/**
 * A typed client: unary and client-streaming methods give a promise, the others an async iterable. Each call takes
 * `{ signal?, deadline? }` (`deadline`: a Date, or milliseconds from now) and fails with a ClusterError.
 */
export type RpcClient<D extends ServiceDescriptor> = RawClient<GrpcServiceDefinition<D>, DeadlineOptions> & {
  /** Closes the connection; running calls end with CANCELLED or UNAVAILABLE. */
  close(): void;
};

export interface ClientOptions {
  tls?: TlsFiles;
  /** For calls that name no deadline, in milliseconds. Default: none, which suits long streams only. */
  defaultDeadlineMs?: number;
  /** How often a silent connection is probed, and how long an answer may take, in milliseconds. Default 10 s and 5 s. */
  keepalive?: { timeMs: number; timeoutMs: number };
}

/** Connects to a service at `address` (`host:port`), lazily: the first call opens the connection. */
export function createClient<D extends ServiceDescriptor>(
  descriptor: D,
  address: string,
  options: ClientOptions = {},
): RpcClient<D> {
  const { tls, keepalive } = options;
  const credentials = tls
    ? ChannelCredentials.createSsl(tls.authority, tls.key, tls.certificate)
    : ChannelCredentials.createInsecure();
  const channel = createChannel(address, credentials, {
    ...channelOptions,
    // Every client owns its connection, so that closing one ends its calls and block streams do not share a window.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
    ...(keepalive && {
      "grpc.keepalive_time_ms": keepalive.timeMs,
      "grpc.keepalive_timeout_ms": keepalive.timeoutMs,
    }),
  });
  const client = createClientFactory()
    .use(deadlineMiddleware)
    .use(clusterErrors)
    .create<GrpcServiceDefinition<D>>(
      serviceDefinition(descriptor),
      channel,
      options.defaultDeadlineMs === undefined ? {} : { "*": { deadline: options.defaultDeadlineMs } },
    );
  // The definition is normal already; the compiler cannot resolve the normalizing type for an open D.
  const calls = client as unknown as RawClient<GrpcServiceDefinition<D>, DeadlineOptions>;
  return Object.assign(calls, { close: () => channel.close() });
}

const clusterErrors: ClientMiddleware<object, DeadlineOptions> = async function* clusterErrors(call, options) {
  let trailer: Metadata | undefined;
  const onTrailer = (received: Metadata) => {
    trailer = received;
    options.onTrailer?.(received);
  };
  try {
    return yield* call.next(call.request, { ...options, onTrailer });
  } catch (error) {
    throw fromRpcError(error, trailer);
  }
};
