/** Where a service's metrics are, as its address on one line for people. */
import type { CachestoreServer } from "@kivimesh/cachestore";

/** `http://host:port/metrics` of the cachestore. @throws where it has no metrics listener. */
export function metricsUrl(cachestore: CachestoreServer): string {
  if (cachestore.metricsUrl === undefined) throw new Error(`cachestore ${cachestore.id} has no metrics listener`);
  return new URL("/metrics", cachestore.metricsUrl).href;
}
