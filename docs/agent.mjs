import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

const key = Buffer.from(process.env.AGENT_SECRET.replace("whsec_", ""), "base64");

function isGenuine(headers, body) {
  const signed = `${headers["webhook-id"]}.${headers["webhook-timestamp"]}.${body}`;
  const wanted = Buffer.from("v1," + createHmac("sha256", key).update(signed).digest("base64"));
  const isFresh = Math.abs(Date.now() / 1000 - Number(headers["webhook-timestamp"])) < 300;
  return isFresh && (headers["webhook-signature"] ?? "").split(" ").some((given) => {
    const got = Buffer.from(given);
    return got.length === wanted.length && timingSafeEqual(got, wanted);
  });
}

const server = createServer(async (request, response) => {
  let body = "";
  for await (const chunk of request) body += chunk;
  if (!isGenuine(request.headers, body)) {
    response.writeHead(401).end();
    return;
  }
  const { data } = JSON.parse(body); // a MessageReceivedEvent
  response.setHeader("content-type", "application/json");
  response.end(JSON.stringify({ response: `${data.content.length} characters, from Node` }));
});
server.listen(Number(process.env.PORT ?? 9000), "127.0.0.1", () => console.log(server.address().port));
