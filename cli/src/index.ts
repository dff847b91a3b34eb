/** The `kivimesh` command. */
export { main } from "./main.ts";
