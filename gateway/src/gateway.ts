import type { JobQueues, Membership } from "@kivimesh/proto";
import type { GatewayConfig } from "./config.ts";

/** What a gateway shares with the rest of the cluster. The caller owns and closes both, after the gateway. */
export interface GatewaySeams {
  jobQueues: JobQueues;
  membership: Membership;
}

/** A running gateway. */
export interface Gateway {
  readonly id: string;
  /** `http://host:port` or `https://host:port`. */
  readonly httpUrl: string;
  /** `host:port`. */
  readonly grpcAddress: string;
  /** Whether a request would be served now. */
  ready(): boolean;
  /** Refuses new requests, lets running ones finish for at most `graceMs`, ends the rest with an error, then closes. */
  drain(graceMs: number): Promise<void>;
  /** Ends everything at once. */
  close(): Promise<void>;
}

/** Starts the HTTP and gRPC listeners and follows the workers that `membership` names. */
export async function startGateway(_config: GatewayConfig, _seams: GatewaySeams): Promise<Gateway> {
  throw new Error("not implemented");
}
