/**
 * The same memory as a plain Uint8Array. A Node Buffer is one by type, but its `slice` shares memory where a Uint8Array's
 * copies, and `bytes` fields inherit the class of what they were decoded from.
 */
export function plainBytes(bytes: Uint8Array): Uint8Array {
  return new Uint8Array(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}
