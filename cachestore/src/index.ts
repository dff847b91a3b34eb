export type { BlockEvent, BlockStore, FollowedEvent, HeldPrefix, StoredBlock, StoreStats } from "./block-store.ts";
export { type CachestoreServer, startCachestore } from "./cachestore.ts";
export {
  type CachestoreConfig,
  cachestoreConfigFromEnvironment,
  defaultDiskBytes,
  defaultMemoryBytes,
} from "./config.ts";
