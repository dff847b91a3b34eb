import { Cachestore, createClient, type RpcClient, type TlsFiles } from "@kivimesh/proto";

/** After a failed call the cachestore is left alone for this long, in milliseconds: requests recompute meanwhile. */
const retreatMs = 1_000;

export type CachestoreClient = RpcClient<typeof Cachestore>;

/** The connection to whichever cachestore is known at the moment, if any and if it did not fail just now. */
export class CachestoreLink {
  readonly #tls: TlsFiles | undefined;
  readonly #clock: () => number;
  #address: string | undefined;
  #client: CachestoreClient | undefined;
  #retreatUntil = 0;

  constructor(tls?: TlsFiles, clock: () => number = () => performance.now()) {
    this.#tls = tls;
    this.#clock = clock;
  }

  get address(): string | undefined {
    return this.#address;
  }

  /** Undefined: none. Calls to the one before end with an error. */
  setAddress(address: string | undefined): void {
    if (address === this.#address) return;
    this.#client?.close();
    this.#client = undefined;
    this.#address = address;
    this.#retreatUntil = 0;
  }

  /** The client to call now; undefined where there is none or it failed lately. */
  client(): CachestoreClient | undefined {
    if (this.#address === undefined || this.#clock() < this.#retreatUntil) return undefined;
    this.#client ??= createClient(Cachestore, this.#address, this.#tls === undefined ? {} : { tls: this.#tls });
    return this.#client;
  }

  /** Notes that a call failed. */
  failed(): void {
    this.#retreatUntil = this.#clock() + retreatMs;
  }

  close(): void {
    this.setAddress(undefined);
  }
}
