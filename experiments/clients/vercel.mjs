// Vercel AI SDK with its default OpenAI model, which uses the Responses API: text, a stream, tools in steps, a schema.
import assert from "node:assert";
import { createRequire } from "node:module";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const url = process.argv[2] ?? "http://127.0.0.1:8000";
const model = createOpenAI({ baseURL: `${url}/v1`, apiKey: "none" })("demo");
assert.equal(model.provider, "openai.responses");
const limits = { model, maxRetries: 0, maxOutputTokens: 40 };

const asked = { role: "user", content: "def add(" };
const first = await generateText({ ...limits, system: "Be brief.", messages: [asked] });
assert.equal(typeof first.text, "string");
assert.ok(first.usage.outputTokens > 0);
const next = [asked, ...first.response.messages, { role: "user", content: "and then?" }]; // refers to the stored item
assert.equal(typeof (await generateText({ ...limits, messages: next })).text, "string");

const stream = streamText({ ...limits, prompt: "def add(", onError: ({ error }) => { throw error; } });
let streamed = "";
for await (const part of stream.textStream) streamed += part;
assert.equal(streamed, await stream.text);

let calls = 0;
const weather = tool({
  description: "How the weather is in a city",
  inputSchema: z.object({ city: z.enum(["Rome", "Oslo"]) }),
  execute: async () => { calls += 1; return "sunny"; },
});
const stepped = await generateText({
  ...limits, maxOutputTokens: 300, tools: { weather }, prompt: "Weather in Rome?", stopWhen: stepCountIs(3),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : "required" }),
});
assert.ok(calls > 0);
assert.ok(stepped.steps.length > 1);

const object = await generateText({
  ...limits, maxOutputTokens: 300, prompt: "Ada is 36.", output: Output.object({ schema: z.object({ old: z.boolean() }) }),
});
assert.equal(typeof object.output.old, "boolean");

const version = (name) => createRequire(import.meta.url)(`${name}/package.json`).version;
console.log("ai", version("ai"), "@ai-sdk/openai", version("@ai-sdk/openai"), "ok:", JSON.stringify(streamed).slice(0, 60));
