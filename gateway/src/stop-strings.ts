/**
 * Cuts a streamed text before the first stop string that completes in it, wherever its parts fell. Text that might be
 * the beginning of a stop string is held back until it is decided; how the text was split never changes the result.
 */
export class StopStrings {
  private readonly stops: readonly string[];
  private held = "";
  private found = false;

  /** `stops`: none empty. Of several that complete at the same character the longest counts. */
  constructor(stops: readonly string[]) {
    this.stops = [...stops].sort((left, right) => right.length - left.length);
  }

  /** Whether a stop string was found. Later text is ignored. */
  get stopped(): boolean {
    return this.found;
  }

  /** The text that is certain to belong to the answer. */
  push(text: string): string {
    if (this.found) {
      return "";
    }
    const buffer = this.held + text;
    for (let end = this.held.length + 1; end <= buffer.length; end++) {
      const stop = this.stops.find((candidate) => buffer.endsWith(candidate, end));
      if (stop !== undefined) {
        this.found = true;
        this.held = "";
        return buffer.slice(0, end - stop.length);
      }
    }
    const kept = buffer.length - this.beginning(buffer);
    this.held = buffer.slice(kept);
    return buffer.slice(0, kept);
  }

  /** The end of the text: what was held back belongs to it after all. */
  finish(): string {
    const rest = this.held;
    this.held = "";
    return rest;
  }

  /** Length of the longest end of `text` that begins a stop string. */
  private beginning(text: string): number {
    let longest = 0;
    for (const stop of this.stops) {
      for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
        if (stop.startsWith(text.slice(text.length - length))) {
          longest = length;
        }
      }
    }
    return longest;
  }
}
