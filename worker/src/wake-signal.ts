/** Lets one sleeper be woken; a wake that comes before the sleep is not lost. */
export class WakeSignal {
  #woken = false;
  #resume: (() => void) | undefined;

  wake(): void {
    this.#woken = true;
    this.#resume?.();
  }

  /** Sleeps until the next wake since the last sleep, for `atMostMs`, or until `event` settles. */
  async sleep(atMostMs?: number, event?: Promise<unknown>): Promise<void> {
    if (!this.#woken) {
      await new Promise<void>((resolve) => {
        event?.then(
          () => resolve(),
          () => resolve(),
        );
        const timer = atMostMs === undefined ? undefined : setTimeout(resolve, atMostMs);
        this.#resume = () => {
          clearTimeout(timer);
          resolve();
        };
      });
    }
    this.#resume = undefined;
    this.#woken = false;
  }
}
