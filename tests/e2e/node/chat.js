// The openai client for Node against a running server: node chat.js http://127.0.0.1:8000/v1 MODEL [KEY]

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, model, apiKey = "none"] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const plain = { model, messages, temperature: 0, max_completion_tokens: 24 };

const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather in a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: ["Paris", "Rome"] }, unit: { type: "string", enum: ["celsius", "fahrenheit"] } },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
};
const withTools = { ...plain, tools: [weather], tool_choice: "required", max_completion_tokens: 128 };

const checks = {
  async "the model is listed"() {
    const models = await client.models.list();
    assert.ok(models.data.some((one) => one.id === model));
  },

  async "an answer comes whole"() {
    const answer = await client.chat.completions.create(plain);
    assert.ok(answer.choices[0].message.content.length > 0);
    assert.equal(answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens);
  },

  async "a stream adds up to it"() {
    const whole = await client.chat.completions.create(plain);
    const stream = await client.chat.completions.create({ ...plain, stream: true, stream_options: { include_usage: true } });
    let text = "";
    let pieces = 0;
    let reason;
    let usage;
    for await (const chunk of stream) {
      const choice = chunk.choices[0];
      if (choice?.delta.content) {
        text += choice.delta.content;
        pieces += 1;
      }
      reason ??= choice?.finish_reason;
      usage ??= chunk.usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.equal(reason, whole.choices[0].finish_reason);
    assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);
    assert.ok(pieces > 1);
  },

  async "a tool is called"() {
    const answer = await client.chat.completions.create(withTools);
    checkCall(answer.choices[0].message.tool_calls[0]);
  },

  async "a tool is called in a stream"() {
    const stream = client.chat.completions.stream({ ...withTools, stream: true });
    let pieces = 0;
    stream.on("tool_calls.function.arguments.delta", () => (pieces += 1));
    const answer = await stream.finalChatCompletion();
    checkCall(answer.choices[0].message.tool_calls[0]);
    assert.ok(pieces > 1);
  },

  async "a stream can be left"() {
    const stream = await client.chat.completions.create({ ...plain, max_completion_tokens: 500, stream: true });
    for await (const chunk of stream) if (chunk.choices[0]?.delta.content) break;
    assert.ok(stream.controller.signal.aborted);
    assert.ok((await client.chat.completions.create(plain)).id);
  },

  async "many at once"() {
    const answers = await Promise.all(Array.from({ length: 8 }, () => client.chat.completions.create(plain)));
    assert.equal(new Set(answers.map((answer) => answer.choices[0].message.content)).size, 1);
    assert.equal(new Set(answers.map((answer) => answer.id)).size, 8);
  },

  async "errors are the client's own"() {
    await assert.rejects(client.chat.completions.create({ ...plain, model: "no-such-model" }), OpenAI.NotFoundError);
    const wrong = client.chat.completions.create({ ...plain, temperature: -1 });
    await assert.rejects(wrong, (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature");
  },
};

function checkCall(call) {
  assert.ok(call.id);
  assert.equal(call.function.name, "get_weather");
  const { city, unit } = JSON.parse(call.function.arguments);
  assert.ok(["Paris", "Rome"].includes(city));
  assert.ok(["celsius", "fahrenheit"].includes(unit));
}

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    console.error(`FAILED: ${name}`);
    throw error;
  }
  console.log(`ok: ${name}`);
}
