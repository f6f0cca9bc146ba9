// The `@anthropic-ai/sdk` package: arguments are its node_modules, the server's URL, and the API (messages).
import { createRequire } from "node:module";

const [modules, url] = process.argv.slice(2);
const Anthropic = createRequire(modules + "/")("@anthropic-ai/sdk");
const client = new Anthropic({ baseURL: url, apiKey: "none" });
const schema = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };
const tools = [{ name: "read", description: "Reads a file.", input_schema: schema }];
const body = { model: "m", max_tokens: 100 };
const asked = (content) => [{ role: "user", content }];
const text = (message) => message.content.find((block) => block.type === "text")?.text;

async function say(content, more = {}) {
  return { text: text(await client.messages.create({ ...body, messages: asked(content), ...more })) };
}

async function streamed(content) {
  const parts = [];
  try {
    for await (const event of client.messages.stream({ ...body, messages: asked(content) })) {
      if (event.type === "content_block_delta" && event.delta.text) parts.push(event.delta.text);
    }
  } catch (error) {
    return { parts, error: error.message };
  }
  return { parts };
}

async function tool(content) {
  const first = await client.messages.stream({ ...body, tools, messages: asked(content) }).finalMessage();
  const call = first.content.find((block) => block.type === "tool_use");
  const result = [{ type: "tool_result", tool_use_id: call.id, content: "Blue." }];
  const answer = { role: "assistant", content: first.content };
  const messages = [...asked(content), answer, { role: "user", content: result }];
  const second = await client.messages.create({ ...body, tools, messages });
  return { name: call.name, given: call.input, text: text(second) };
}

const refused = await say("hello", { temperature: 101 }).catch((error) => error);
console.log(
  JSON.stringify({
    chat: await say("hello"),
    stream: await streamed("count"),
    tool: await tool("which colour"),
    refused: { status: refused.status, error: refused.message },
    broken: await streamed("break here"),
  }),
);
