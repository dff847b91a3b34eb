import { Template } from "@huggingface/jinja";
import { ClusterError } from "@kivimesh/proto";

/** One turn of a conversation. */
export interface Turn {
  readonly role: string;
  readonly content: string;
}

/** Special tokens that templates name, as text; absent ones render as nothing. */
export interface TemplateTokens {
  readonly bos_token?: string;
  readonly eos_token?: string;
  readonly unk_token?: string;
  readonly pad_token?: string;
}

/** A model's Jinja chat template. */
export class ChatTemplate {
  private readonly template: Template;
  private readonly tokens: TemplateTokens;

  /** Throws MODEL_FILE_INVALID where `source` does not parse. */
  constructor(source: string, tokens: TemplateTokens) {
    try {
      this.template = new Template(source);
    } catch (error) {
      throw new ClusterError("MODEL_FILE_INVALID", `the chat template does not parse: ${reason(error)}`, {
        cause: error,
      });
    }
    this.tokens = tokens;
  }

  /**
   * The prompt for `turns`, up to where the assistant's answer begins. Throws INVALID_ARGUMENT (parameter `messages`)
   * with the template's own words where it refuses the conversation.
   */
  render(turns: readonly Turn[]): string {
    try {
      return this.template.render({
        messages: turns.map((turn) => ({ ...turn })),
        add_generation_prompt: true,
        tools: null,
        documents: null,
        ...this.tokens,
      });
    } catch (error) {
      throw new ClusterError("INVALID_ARGUMENT", `messages: the model's chat template refuses them: ${reason(error)}`, {
        parameter: "messages",
        cause: error,
      });
    }
  }
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
