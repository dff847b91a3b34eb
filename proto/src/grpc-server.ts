import { ServerCredentials } from "@grpc/grpc-js";
import {
  type CallContext,
  createServer,
  type Server,
  type ServerMiddleware,
  type ServiceImplementation,
} from "nice-grpc";
import { HealthDefinition, HealthServiceImpl, HealthState } from "nice-grpc-server-health";
import { errorTrailer, toServerError } from "./errors.ts";
import { assertSecureListener, channelOptions, hostAndPort, type TlsFiles } from "./grpc-channel.ts";
import { addReflection } from "./grpc-reflection.ts";
import {
  type GrpcServiceDefinition,
  type ServiceDescriptor,
  type ServiceHandlers,
  serviceDefinition,
} from "./service-definition.ts";

/** Health names of the Kubernetes probes, beside "" (the whole server). */
const readinessName = "readiness";
const livenessName = "liveness";

/** A service with its implementation, ready to be served. */
export interface ServiceBinding {
  readonly descriptor: ServiceDescriptor;
  addTo(server: Server): void;
}

/** Binds handlers to a generated service descriptor. */
export function implementService<D extends ServiceDescriptor>(
  descriptor: D,
  handlers: ServiceHandlers<D>,
): ServiceBinding {
  return {
    descriptor,
    addTo(server) {
      // The definition is normal already; the compiler cannot resolve the normalizing type for an open D.
      server.add(serviceDefinition(descriptor), handlers as ServiceImplementation<GrpcServiceDefinition<D>>);
    },
  };
}

export interface GrpcServerOptions {
  /** Default 127.0.0.1. Another than loopback needs `tls` or `allowInsecure`. */
  host?: string;
  /** 0: any free port. */
  port: number;
  services: readonly ServiceBinding[];
  tls?: TlsFiles;
  allowInsecure?: boolean;
  /** Server reflection, default true. */
  reflection?: boolean;
  /** Told of every error that is not a ClusterError: a defect, to be logged. */
  onInternalError?: (error: unknown, method: string) => void;
}

export interface GrpcServer {
  readonly port: number;
  /** `host:port` as clients on this machine dial it. */
  readonly address: string;
  /** What `readiness` and "" answer; starts as not serving. `liveness` is serving until shutdown. */
  setServing(serving: boolean): void;
  /** Stops accepting, waits up to `graceMs` for running calls, then cuts them. */
  shutdown(graceMs: number): Promise<void>;
}

/**
 * Serves gRPC services with `grpc.health.v1`, server reflection and error mapping: handlers throw ClusterErrors, callers
 * made by `createClient` catch the same. Refuses a listener in the clear that others can reach (INVALID_ARGUMENT).
 */
export async function serveGrpc(options: GrpcServerOptions): Promise<GrpcServer> {
  const host = options.host ?? "127.0.0.1";
  assertSecureListener({ ...options, host });
  const server = createServer(channelOptions).use(errorMapping(options.onInternalError));
  for (const service of options.services) {
    service.addTo(server);
  }
  const health = HealthState();
  health.setStatus("healthy", livenessName);
  setReady(health, false);
  server.add(HealthDefinition, HealthServiceImpl(health));
  if (options.reflection !== false) {
    addReflection(
      server,
      options.services.map((service) => service.descriptor),
    );
  }
  const port = await server.listen(hostAndPort(host, options.port), credentials(options.tls));
  return {
    port,
    address: hostAndPort(host, port),
    setServing: (serving) => setReady(health, serving),
    async shutdown(graceMs) {
      setReady(health, false);
      health.setStatus("unhealthy", livenessName);
      const cut = setTimeout(() => server.forceShutdown(), graceMs);
      try {
        await server.shutdown();
      } finally {
        clearTimeout(cut);
      }
    },
  };
}

function setReady(health: HealthState, ready: boolean): void {
  health.setStatus(ready ? "healthy" : "unhealthy", readinessName);
  health.setStatus(ready ? "healthy" : "unhealthy");
}

function credentials(tls: TlsFiles | undefined): ServerCredentials {
  if (tls === undefined) {
    return ServerCredentials.createInsecure();
  }
  const keys = [{ private_key: tls.key, cert_chain: tls.certificate }];
  return ServerCredentials.createSsl(tls.authority, keys, true);
}

function errorMapping(onInternalError: GrpcServerOptions["onInternalError"]): ServerMiddleware {
  return async function* mapErrors(call, context: CallContext) {
    try {
      return yield* call.next(call.request, context);
    } catch (error) {
      const mapped = toServerError(error);
      if (mapped !== error) {
        for (const [key, values] of errorTrailer(error)) {
          context.trailer.set(key, values);
        }
        if (errorTrailer(error).get("kivimesh-error-code") === "INTERNAL") {
          onInternalError?.(error, call.method.path);
        }
      }
      throw mapped;
    }
  };
}
