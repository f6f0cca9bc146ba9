// The `openai` package for JavaScript: arguments are its node_modules, the server's URL, and the API.
import { createRequire } from "node:module";

const [modules, url, api] = process.argv.slice(2);
const OpenAI = createRequire(modules + "/")("openai");
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none" });
const parameters = { type: "object", properties: { path: { type: "string" } }, required: ["path"] };
const about = { name: "read", description: "Reads a file.", parameters };

const chat = {
  async say(content, more = {}) {
    const messages = [{ role: "user", content }];
    const answer = await client.chat.completions.create({ model: "m", messages, ...more });
    return { text: answer.choices[0].message.content };
  },
  async *stream(content) {
    const body = { model: "m", messages: [{ role: "user", content }], stream: true };
    for await (const chunk of await client.chat.completions.create(body)) {
      yield chunk.choices[0]?.delta.content ?? "";
    }
  },
  async tool(content) {
    const messages = [{ role: "user", content }];
    const body = { model: "m", tools: [{ type: "function", function: about }] };
    const stream = client.chat.completions.stream({ ...body, messages });
    const { message } = (await stream.finalChatCompletion()).choices[0];
    const [call] = message.tool_calls;
    const result = { role: "tool", tool_call_id: call.id, content: "Blue." };
    const second = await client.chat.completions.create({ ...body, messages: [...messages, message, result] });
    const { name, arguments: given } = call.function;
    return { name, given: JSON.parse(given), text: second.choices[0].message.content };
  },
};

const responses = {
  async say(input, more = {}) {
    return { text: (await client.responses.create({ model: "m", input, ...more })).output_text };
  },
  async *stream(input) {
    for await (const event of await client.responses.create({ model: "m", input, stream: true })) {
      if (event.type === "response.output_text.delta") yield event.delta;
    }
  },
  async tool(content) {
    const input = [{ role: "user", content }];
    const body = { model: "m", tools: [{ type: "function", strict: false, ...about }] };
    const { output } = await client.responses.stream({ ...body, input }).finalResponse();
    const call = output.find((item) => item.type === "function_call");
    const result = { type: "function_call_output", call_id: call.call_id, output: "Blue." };
    const second = await client.responses.create({ ...body, input: [...input, ...output, result] });
    return { name: call.name, given: JSON.parse(call.arguments), text: second.output_text };
  },
};

const { say, stream, tool } = { chat, responses }[api];

async function streamed(content) {
  const parts = [];
  try {
    for await (const part of stream(content)) if (part) parts.push(part);
  } catch (error) {
    return { parts, error: error.message };
  }
  return { parts };
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
