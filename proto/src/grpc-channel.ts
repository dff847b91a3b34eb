import type { ChannelOptions } from "@grpc/grpc-js";
import { ClusterError } from "./errors.ts";

/** PEM contents. `certificate` and `key` identify this side; `authority` signs the other side's (mutual TLS). */
export interface TlsFiles {
  certificate: Buffer;
  key: Buffer;
  authority: Buffer;
}

/** Largest message either side accepts; block payloads travel in chunks of 1 MiB, prompts and logits in one message. */
export const maxMessageBytes = 64 * 1024 * 1024;

/** Options of both ends. The wide flow-control window doubles the throughput of block streams on loopback. */
export const channelOptions: ChannelOptions = {
  "grpc.max_receive_message_length": maxMessageBytes,
  "grpc.max_send_message_length": maxMessageBytes,
  "grpc-node.flow_control_window": 16 * 1024 * 1024,
  // A peer that is cut off or stopped without closing its socket is noticed and its calls end.
  "grpc.keepalive_time_ms": 10_000,
  "grpc.keepalive_timeout_ms": 5_000,
};

const loopbackHosts = new Set(["localhost", "::1", "[::1]"]);

/** Whether `host` can only be reached from this machine. */
export function isLoopback(host: string): boolean {
  return loopbackHosts.has(host) || /^127(\.\d{1,3}){3}$/.test(host);
}

/**
 * Refuses to open a listener in the clear on an address that others can reach. Throws INVALID_ARGUMENT.
 * `allowInsecure` is the operator's word that the network is private (flag or KIVIMESH_ALLOW_INSECURE).
 */
export function assertSecureListener(listener: { host: string; tls?: TlsFiles; allowInsecure?: boolean }): void {
  if (listener.tls === undefined && listener.allowInsecure !== true && !isLoopback(listener.host)) {
    throw new ClusterError(
      "INVALID_ARGUMENT",
      `refusing to listen on ${listener.host} without TLS: give a certificate, listen on 127.0.0.1, ` +
        "or set KIVIMESH_ALLOW_INSECURE=1 on a private network",
      { parameter: "host" },
    );
  }
}

/** `host:port`, with brackets around an IPv6 address. */
export function hostAndPort(host: string, port: number): string {
  return host.includes(":") && !host.startsWith("[") ? `[${host}]:${port}` : `${host}:${port}`;
}
